"""What every optimizer keeps: one suite, run on every name in `NAMES`, where a new optimizer adds its own."""

from __future__ import annotations

import copy
import dataclasses
import json
import random

import numpy as np
import pytest

from evomerge.errors import StorageError
from evomerge.search import CategoricalParameter, FloatParameter, Start, make_optimizer

# A Gaussian process is fitted once per ask from the fourth trial on, slowly: the suite asks it little.
OPTIONS = {"gp": {"n_startup_trials": 3}, "tpe": {"n_startup_trials": 5}}
POPULATION = {"cma": 6, "mixed": 6, "nsga2": 6, "nsga3": 6}
NAMES = ["cma", "mixed", "tpe", "gp", "nsga2", "nsga3", "random", "qmc"]
STEPS = {"gp": 4}
FLOATS_ONLY = {"cma", "gp"}

every_optimizer = pytest.mark.parametrize("name", NAMES)


def space(name, n=2):
    floats = [FloatParameter(f"w{i}", -0.5, 1.5) for i in range(n)]
    return (
        floats
        if name in FLOATS_ONLY
        else [*floats, CategoricalParameter("method", ("linear", "ties", "dare"))]
    )


def middle(parameters):
    return {p.name: 0.5 if isinstance(p, FloatParameter) else p.choices[0] for p in parameters}


def make(name, parameters=None, seed=0, start=None, **arguments):
    parameters = parameters or space(name)
    arguments.setdefault("options", OPTIONS.get(name))
    arguments.setdefault("population_size", POPULATION.get(name))
    return make_optimizer(name, parameters, seed=seed, start=start or Start(middle(parameters)), **arguments)


def bowl(params, centre=0.3):
    """Fitness with its maximum 0 at `centre` in every weight and the method `ties`."""
    floats = [v for v in params.values() if isinstance(v, float)]
    return -sum((v - centre) ** 2 for v in floats) - (params.get("method", "ties") != "ties")


def run(optimizer, steps, fitness=bowl):
    """Ask and tell `steps` times; the history. `fitness` may return None."""
    history = []
    for _ in range(steps):
        proposal = optimizer.ask()
        history.append((proposal, fitness(proposal.params)))
        optimizer.tell(*history[-1])
    return history


def steps_for(name, usual=20):
    return STEPS.get(name, usual)


@every_optimizer
def test_proposals_are_plain_values_inside_their_bounds(name):
    parameters = space(name)
    for number, (proposal, _) in enumerate(run(make(name), steps_for(name))):
        assert proposal.number == number
        assert list(proposal.params) == [p.name for p in parameters]
        for p in parameters:
            value = proposal.params[p.name]
            if isinstance(p, FloatParameter):
                assert type(value) is float
                assert p.low <= value <= p.high
            else:
                assert type(value) is str
                assert value in p.choices


@every_optimizer
def test_a_replayed_optimizer_asks_what_the_uninterrupted_one_asks(name):
    """With a missing fitness in the history, cut inside and at the end of generations."""
    more = steps_for(name, usual=18)  # three generations of 6

    def fitness(params):
        return None if 0.2 < params["w0"] < 0.4 else bowl(params)

    history = run(make(name), 15 + more if name != "gp" else 5, fitness)
    for cut in (0, 1, 4, 6, 12, 15) if name != "gp" else (4,):
        resumed = make(name)
        resumed.replay(history[:cut])
        assert run(resumed, len(history[: cut + more]) - cut, fitness) == history[cut : cut + more]


@every_optimizer
def test_a_history_that_went_through_json_replays_the_same(name):
    history = run(make(name), 4)
    stored = json.loads(
        json.dumps([(dataclasses.asdict(proposal), fitness) for proposal, fitness in history])
    )
    proposal_class = type(history[0][0])
    resumed = make(name)
    resumed.replay([(proposal_class(**fields), fitness) for fields, fitness in stored])
    expected = make(name)
    run(expected, 4)
    assert resumed.ask() == expected.ask()


@every_optimizer
def test_one_seed_gives_one_search_and_another_seed_another(name):
    steps = steps_for(name, usual=8)
    first, again, other = (run(make(name, seed=seed), steps) for seed in (7, 7, 8))
    assert first == again
    assert first[1:] != other[1:]  # the first is the start


@every_optimizer
def test_global_random_generators_are_neither_read_nor_written(name):
    np.random.seed(1)
    random.seed(1)
    before = (np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate())
    first = run(make(name), steps_for(name, usual=14))
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()) == before
    np.random.seed(2)
    random.seed(2)
    assert run(make(name), steps_for(name, usual=14)) == first


@every_optimizer
def test_what_the_caller_hands_in_is_not_changed(name):
    parameters = space(name)
    start = Start(middle(parameters), 0.2, ((middle(parameters) | {"w0": 0.1}, -1.0),))
    options = dict(OPTIONS.get(name, {}))
    given = copy.deepcopy((parameters, start, options))
    history = run(make(name, parameters, start=start, options=options), steps_for(name, usual=14))
    told = copy.deepcopy(history)
    make(name, parameters, start=start, options=options).replay(history)
    assert (parameters, start, options) == given
    assert history == told


@every_optimizer
def test_asking_twice_is_refused(name):
    optimizer = make(name)
    optimizer.ask()
    with pytest.raises(RuntimeError, match="`ask` was called last and proposal 0 has not been told"):
        optimizer.ask()


@every_optimizer
def test_telling_twice_is_refused(name):
    optimizer = make(name)
    proposal = optimizer.ask()
    optimizer.tell(proposal, 0.0)
    with pytest.raises(RuntimeError, match="`tell` was called last"):
        optimizer.tell(proposal, 0.0)


@every_optimizer
def test_telling_before_asking_is_refused(name):
    with pytest.raises(RuntimeError, match="nothing has been asked"):
        make(name).tell(make(name).ask(), 0.0)


@every_optimizer
def test_telling_another_proposal_than_the_one_asked_is_refused(name):
    optimizer = make(name)
    proposal = optimizer.ask()
    changed = dataclasses.replace(proposal, params={**proposal.params, "w0": 0.123})
    for wrong in (changed, dataclasses.replace(proposal, number=5)):
        with pytest.raises(RuntimeError, match="in the order asked and unchanged"):
            optimizer.tell(wrong, 0.0)
    optimizer.tell(proposal, 0.0)  # the refusals changed nothing


@every_optimizer
@pytest.mark.parametrize("fitness", [float("nan"), float("inf"), float("-inf")])
def test_a_fitness_that_is_no_finite_number_is_refused(name, fitness):
    optimizer = make(name)
    with pytest.raises(ValueError, match=f"fitness of proposal 0 is {fitness}, but must be a finite number"):
        optimizer.tell(optimizer.ask(), fitness)


@every_optimizer
def test_replaying_into_a_used_optimizer_is_refused(name):
    optimizer = make(name)
    history = run(optimizer, 2)
    with pytest.raises(RuntimeError, match="`tell` was called last; replay a history into a fresh optimizer"):
        optimizer.replay(history)


@every_optimizer
def test_a_history_with_a_gap_is_refused(name):
    history = run(make(name), 3)
    with pytest.raises(StorageError, match="proposal 2 where 1 was expected"):
        make(name).replay([history[0], history[2]])


@every_optimizer
def test_a_history_of_another_search_space_is_refused(name):
    history = run(make(name), 3)
    narrow = [
        dataclasses.replace(p, low=0.49, high=0.51) if isinstance(p, FloatParameter) else p
        for p in space(name)
    ]
    with pytest.raises(StorageError, match=r"proposal 1 of the history does not fit .*parameter `w\d`"):
        make(name, narrow).replay(history)


@every_optimizer
def test_a_history_with_another_token_is_refused(name):
    history = [
        (dataclasses.replace(proposal, token="{}"), fitness) for proposal, fitness in run(make(name), 2)
    ]
    with pytest.raises(StorageError, match="its token is not one of this optimizer"):
        make(name).replay(history)


@every_optimizer
def test_missing_fitnesses_are_survived_even_for_whole_generations(name):
    optimizer = make(name)
    run(optimizer, steps_for(name, usual=18), lambda params: None)
    assert not optimizer.should_stop()
    run(optimizer, steps_for(name, usual=18), lambda params: bowl(params) if params["w0"] > 0.5 else None)


@every_optimizer
def test_the_start_is_the_first_proposal(name):
    start = {**middle(space(name)), "w0": -0.5, "w1": 0.1}  # one of them on its bound
    assert make(name, start=Start(start)).ask().params == start


@every_optimizer
def test_no_proposal_is_spent_on_a_start_of_known_fitness(name):
    start = middle(space(name))
    optimizer = make(name, start=Start(start, known=((dict(start), 0.0),)))
    assert all(proposal.params != start for proposal, _ in run(optimizer, 4))


@every_optimizer
def test_one_parameter_can_be_searched(name):
    parameters = [FloatParameter("w", 0.0, 2.0)]
    history = run(make(name, parameters, start=Start({"w": 1.5})), steps_for(name, usual=30))
    assert len({proposal.params["w"] for proposal, _ in history}) > len(history) / 2


@every_optimizer
def test_sixty_parameters_can_be_searched(name):
    history = run(make(name, space(name, n=60)), 14 if name != "gp" else 3)
    assert all(len(proposal.params) >= 60 for proposal, _ in history)


@every_optimizer
def test_known_points_change_what_is_asked(name):
    if name in ("random", "qmc"):
        pytest.skip("does not learn")
    parameters = space(name)
    far = [middle(parameters) | {"w0": 1.4, "w1": w} for w in (1.3, 1.35, 1.4, 1.45)]
    known = tuple((params, float(i)) for i, params in enumerate(far))
    steps = 2 if name == "gp" else 12
    without, informed = (
        [
            p.params
            for p, _ in run(make(name, start=Start(middle(parameters), known=k)), steps, lambda _: None)
        ]
        for k in ((), known)
    )
    assert np.mean([p["w0"] for p in informed]) > np.mean([p["w0"] for p in without])


@pytest.mark.parametrize("name", ["cma", "mixed", "tpe"])
def test_a_bowl_is_climbed_further_than_by_chance(name):
    """Best of 100 evaluations in five dimensions, median over three seeds, against uniform draws."""

    def best(which, seed):
        optimizer = make(
            which, [FloatParameter(f"w{i}", 0.0, 1.0) for i in range(5)], seed, population_size=None
        )
        return max(fitness for _, fitness in run(optimizer, 100))

    assert np.median([best(name, s) for s in range(3)]) > 0.2 * np.median(
        [best("random", s) for s in range(3)]
    )


def test_a_gaussian_process_climbs_a_bowl_further_than_chance():
    best = {which: max(f for _, f in run(make(which, space("gp")), 8)) for which in ("gp", "random")}
    assert best["gp"] > 0.5 * best["random"]  # negative numbers: half as far from the optimum's 0


@pytest.mark.parametrize("name", ["cma", "mixed"])
@pytest.mark.parametrize("centre", [-0.5, -0.7, 1.5])
def test_an_optimum_on_a_bound_is_reached(name, centre):
    """The bound itself is the best point inside, also where the fitness still rises beyond it."""
    history = run(make(name, space("cma"), population_size=None), 300, lambda params: bowl(params, centre))
    best = max(history, key=lambda told: told[1])[0].params
    assert all(abs(v - min(max(centre, -0.5), 1.5)) < 1e-3 for v in best.values())


@pytest.mark.parametrize("name", ["mixed", "tpe"])
def test_the_best_categories_are_found(name):
    """Six parameters with three choices each: 729 combinations, of which 150 are tried."""
    parameters = [CategoricalParameter(f"m{i}", ("a", "b", "c")) for i in range(6)]
    history = run(
        make(name, parameters, population_size=None),
        150,
        lambda params: float(sum(value == "c" for value in params.values())),
    )
    assert max(fitness for _, fitness in history) == 6.0


@pytest.mark.parametrize("name", ["cma", "mixed"])
def test_first_proposals_spread_by_sigma_around_the_start(name):
    """400 draws of a generation: 5 standard errors of the mean, and of the standard deviation."""
    parameters = [FloatParameter("u", 0.0, 10.0), FloatParameter("v", -1.0, 1.0)]
    start = Start({"u": 6.0, "v": 0.0}, sigma=0.05)
    history = run(make(name, parameters, start=start, population_size=400), 400)
    for p in parameters:
        unit = np.array([(proposal.params[p.name] - p.low) / (p.high - p.low) for proposal, _ in history])
        centre = (start.params[p.name] - p.low) / (p.high - p.low)
        assert abs(unit.mean() - centre) < 5 * 0.05 / 400**0.5
        assert abs(unit.std() / 0.05 - 1) < 5 / (2 * 400) ** 0.5


@pytest.mark.parametrize("name", ["cma", "mixed"])
def test_a_history_of_another_processor_is_taken_up_where_it_stood(name):
    """Points that differ in the last digits are told as recorded, and the search goes on from them."""
    expected = make(name)
    history = run(expected, 13)
    drifted = []
    for proposal, fitness in history:
        token = json.loads(proposal.token)
        token["v"] = [v + 1e-13 for v in token["v"]]
        drifted.append((dataclasses.replace(proposal, token=json.dumps(token)), fitness))
    resumed = make(name)
    resumed.replay(drifted)
    assert resumed.ask().params["w0"] == pytest.approx(expected.ask().params["w0"], abs=1e-9)


@pytest.mark.parametrize("name", ["cma", "mixed"])
def test_a_plateau_stops_the_search_and_failures_do_not(name):
    flat, failing = make(name), make(name)
    run(flat, 29, lambda params: 1.0)
    assert not flat.should_stop()
    run(flat, 1, lambda params: 1.0)  # the fifth generation of 6
    assert flat.should_stop()
    run(failing, 60, lambda params: None)
    assert not failing.should_stop()


@pytest.mark.parametrize("name", ["cma", "mixed"])
def test_a_generation_with_many_ties_is_learned(name):
    """Accuracies on few items: all equal but one, first in the generation and then last."""
    for better in (0, 5):
        optimizer = make(name)
        fitness = iter([1.0 if i % 6 == better else 0.5 for i in range(24)])
        history = run(optimizer, 24, lambda params, fitness=fitness: next(fitness))
        assert all(np.isfinite(v) for p, _ in history for v in p.params.values() if isinstance(v, float))


@pytest.mark.parametrize("name", ["cma", "mixed"])
def test_a_generation_without_fitness_leaves_the_distribution_where_it_was(name):
    """Seen from the outside: one in which everything failed costs its draws, nothing else."""
    parameters = [FloatParameter("u", 0.0, 10.0)]
    start = Start({"u": 5.0}, sigma=0.02)
    optimizer = make(name, parameters, start=start, population_size=40)
    run(optimizer, 40 * 10, lambda params: None)
    later = [proposal.params["u"] / 10 for proposal, _ in run(optimizer, 40, lambda params: None)]
    assert abs(np.mean(later) - 0.5) < 5 * 0.02 / 40**0.5
    assert abs(np.std(later) / 0.02 - 1) < 5 / 80**0.5


def test_cma_stops_when_it_has_converged():
    optimizer = make("cma", [FloatParameter("w", 0.0, 1.0)])
    proposals = 0
    while not optimizer.should_stop() and proposals < 2000:
        run(optimizer, 1)
        proposals += 1
    assert 100 < proposals < 2000


def test_cma_improves_more_than_a_hundred_parameters():
    history = run(make("cma", space("cma", n=120), population_size=None), 900)
    assert np.mean([f for _, f in history[-90:]]) > np.mean([f for _, f in history[:90]])


def test_mixed_begins_with_the_categories_of_the_start():
    """Half of the draws keep the start's choice, a third of the others fall on it: 2/3 of three choices."""
    parameters = [CategoricalParameter("m", ("a", "b", "c"))]
    history = run(make("mixed", parameters, start=Start({"m": "b"}), population_size=400), 400)
    share = np.mean([proposal.params["m"] == "b" for proposal, _ in history])
    assert abs(share - 2 / 3) < 5 * (2 / 9 / 400) ** 0.5


def test_known_points_are_parents_of_a_genetic_algorithm():
    parameters = [FloatParameter(f"w{i}", 0.0, 1.0) for i in range(12)]
    points = [{p.name: value for p in parameters} for value in (0.2, 0.4, 0.6, 0.8)]
    start = Start(points[0], known=tuple((point, 1.0) for point in points))
    child = make("nsga2", parameters, start=start, population_size=4).ask().params
    assert (
        sum(value in (0.2, 0.4, 0.6, 0.8) for value in child.values()) >= 8
    )  # the rest mutated, 1 of 12 expected


def test_every_combination_is_tried_once_and_then_the_search_stops():
    parameters = [CategoricalParameter("m", ("a", "b", "c")), CategoricalParameter("n", ("x", "y"))]
    optimizer = make("brute_force", parameters)
    seen = set()
    for _ in range(6):
        assert not optimizer.should_stop()
        seen |= {tuple(proposal.params.values()) for proposal, _ in run(optimizer, 1, lambda params: 0.0)}
    assert len(seen) == 6
    assert optimizer.should_stop()


def test_qmc_proposals_are_one_sequence_though_its_sampler_is_made_anew():
    """Sixteen points of a scrambled Sobol sequence put one into each sixteenth of an axis (Owen 1995)."""
    history = run(make("qmc", [FloatParameter("w", 0.0, 1.0)], start=Start({"w": 0.5})), 17)
    assert sorted(int(16 * proposal.params["w"]) for proposal, _ in history[1:]) == list(range(16))


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_optuna_learns_a_missing_fitness_as_the_worst_so_far(name):
    def missing(params):
        return None if params["w0"] > 0.5 else bowl(params)

    history = run(make(name), 30, missing)
    worst, explicit = 0.0, []
    for proposal, fitness in history:
        worst = min(worst, 0.0 if fitness is None else fitness)
        explicit.append((proposal, worst if fitness is None else fitness))
    resumed = make(name)
    resumed.replay(explicit)
    expected = make(name)
    expected.replay(history)
    assert history[0][1] is not None
    assert any(fitness is None for _, fitness in history)
    assert run(resumed, 6) == run(expected, 6)
