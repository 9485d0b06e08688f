"""`make_optimizer` refuses what cannot work, in words that say what to change, and imports late."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evomerge.errors import ConfigError
from evomerge.search import OPTIMIZERS, CategoricalParameter, FloatParameter, Start, make_optimizer
from evomerge.search.generations import costs_of

WEIGHTS = (FloatParameter("w", 0.0, 1.0), FloatParameter("v", 0.0, 1.0))
START = Start({"w": 0.5, "v": 0.5})
METHOD = CategoricalParameter("method", ("ties", "dare"))


def refusal(name="cma", parameters=WEIGHTS, start=START, seed=0, **arguments):
    with pytest.raises(ConfigError) as caught:
        make_optimizer(name, parameters, seed=seed, start=start, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(("name", "nearest"), [("cmaes", "cma"), ("mixde", "mixed"), ("nsga22", "nsga2")])
def test_an_unknown_optimizer_is_refused_with_the_nearest_name(name, nearest):
    assert f"there is no optimizer `{name}`, did you mean `{nearest}`?" in refusal(name)


def test_an_optuna_sampler_goes_by_its_class_name_too():
    assert make_optimizer("TPESampler", WEIGHTS, seed=0, start=START).ask().params == START.params


@pytest.mark.parametrize("name", ["BaseSampler", "BaseGASampler", "nsgaii", "__name__"])
def test_what_is_no_sampler_is_an_unknown_optimizer(name):
    assert f"there is no optimizer `{name}`" in refusal(name)


@pytest.mark.parametrize("name", ["CmaEsSampler", "GridSampler", "PartialFixedSampler"])
def test_samplers_that_cannot_be_replayed_say_what_to_use(name):
    assert refusal(name).startswith(f"optimizer `{name}` cannot be used here: it ")


def test_cma_names_the_categorical_parameter_it_cannot_search():
    message = refusal("cma", (*WEIGHTS, METHOD), Start({**START.params, "method": "ties"}))
    assert "`method` has named values; use `mixed` or `tpe`" in message


def test_brute_force_names_the_real_parameter_it_cannot_search():
    assert "`w` is a real parameter" in refusal("brute_force")


@pytest.mark.parametrize(
    ("name", "option", "nearest"),
    [
        ("cma", "tolfum", "tolfun"),
        ("tpe", "n_startup_trial", "n_startup_trials"),
        ("nsga2", "mutationprob", "mutation_prob"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(name, option, nearest):
    assert f"has no option `{option}`, did you mean `{nearest}`?" in refusal(name, options={option: 1})


def test_mixed_has_no_options():
    assert "optimizer `mixed` has no option `sigma`; it has none" in refusal("mixed", options={"sigma": 1})


@pytest.mark.parametrize("name", ["cma", "tpe"])
def test_the_seed_is_no_option(name):
    assert "has no option `seed`" in refusal(name, options={"seed": 1})


def test_an_option_that_is_a_text_does_not_reach_pycma_which_would_evaluate_it():
    assert "option `tolfun` is the text 'exit()'" in refusal(options={"tolfun": "exit()"})


def test_diagonal_generations_are_refused_because_pycma_then_draws_globally():
    assert "`CMA_diagonal` is 10, but must be true or false" in refusal(options={"CMA_diagonal": 10})


def test_a_value_that_the_sampler_refuses_is_a_configuration_error():
    assert refusal("nsga2", options={"crossover_prob": 2.0}).startswith("optimizer `nsga2`: ")


@pytest.mark.parametrize("name", ["cma", "mixed"])
def test_too_small_a_population_is_refused(name):
    assert "population_size is 3, but must be at least 4" in refusal(name, population_size=3)


def test_a_population_is_refused_where_there_is_none():
    assert "optimizer `tpe` has no population" in refusal("tpe", population_size=10)


@pytest.mark.parametrize(("name", "package"), [("gp", "torch"), ("gp", "scipy"), ("qmc", "scipy")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"optimizer `{name}` needs {package}, which is not installed" in refusal(name)


@pytest.mark.parametrize(
    ("start", "clause"),
    [
        (Start({"w": 0.5}), "parameter `v` has no value"),
        (Start({"w": 0.5, "v": 0.5, "u": 1.0}), "`u` is no parameter of this search"),
        (Start({"w": 0.5, "v": 1.5}), r"parameter `v` is 1.5, but must be in [0.0, 1.0]"),
        (Start({"w": 0.5, "v": float("nan")}), "parameter `v` is nan"),
        (Start({"w": 0.5, "v": "ties"}), "parameter `v` is 'ties'"),
        (Start(START.params, sigma=0.0), "sigma is 0.0"),
        (Start(START.params, known=(({"w": 2.0, "v": 0.0}, 1.0),)), "known point 0: parameter `w` is 2.0"),
        (Start(START.params, known=((START.params, float("nan")),)), "known point 0: its fitness is nan"),
    ],
)
def test_a_start_outside_the_space_is_refused(start, clause):
    assert clause in refusal(start=start)


@pytest.mark.parametrize(
    ("parameters", "clause"),
    [
        ((), "the search space has no parameters"),
        ((WEIGHTS[0], WEIGHTS[0]), "parameter `w` is declared twice"),
        ((FloatParameter("w", 1.0, 1.0),), "parameter `w` has the range [1.0, 1.0]"),
        ((FloatParameter("w", 0.0, float("inf")),), "parameter `w` has the range [0.0, inf]"),
        ((CategoricalParameter("m", ("a",)),), "parameter `m` has the choices ['a']"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(parameters, clause):
    assert clause in refusal(parameters=parameters)


def test_a_categorical_value_outside_its_choices_is_refused():
    assert "`method` is 'slerp', but must be one of ties, dare" in refusal(
        "mixed", (METHOD,), Start({"method": "slerp"})
    )


def test_a_negative_seed_is_refused():
    assert "the seed is -1" in refusal(seed=-1)


def test_costs_are_negated_fitnesses_and_a_missing_one_is_beyond_the_worst():
    assert costs_of([1.0, 3.0, None, 2.0]) == [-1.0, -3.0, 1.0, -2.0]


def test_a_missing_fitness_ranks_last_even_among_equal_ones():
    assert costs_of([2.0, None, 2.0]) == [-2.0, 0.0, -2.0]


@pytest.mark.parametrize("fitnesses", [[None, None], [0.5, 0.5, 0.5]])
def test_a_generation_that_ranks_nothing_has_no_costs(fitnesses):
    assert costs_of(fitnesses) is None


def test_cma_prints_nothing_and_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    optimizer = make_optimizer("cma", WEIGHTS, seed=0, start=START)
    for number in range(20):
        optimizer.tell(optimizer.ask(), float(number))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_libraries_are_imported_when_an_optimizer_of_theirs_is_made():
    """In a fresh process, warnings as errors; the first import may not touch the global generator either."""
    script = """
import sys
import numpy as np
from evomerge.search import FloatParameter, Start, make_optimizer
heavy = {"cma", "cmaes", "optuna", "scipy", "torch"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
np.random.seed(0)
before = np.random.get_state()[1].tolist()
make_optimizer("cma", [FloatParameter("w", 0.0, 1.0)], seed=0, start=Start({"w": 0.5})).ask()
assert heavy & set(sys.modules) <= {"cma", "scipy"}, heavy & set(sys.modules)
assert np.random.get_state()[1].tolist() == before
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_optimizer_of_the_help_can_be_made():
    for name in OPTIMIZERS:
        parameters = [METHOD] if name == "brute_force" else WEIGHTS
        start = Start({"method": "ties"}) if name == "brute_force" else START
        assert make_optimizer(name, parameters, seed=0, start=start).name == name
