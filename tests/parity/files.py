"""Random mergekit files, drawn by hypothesis: every method and every form that a parameter can have."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.parity.families import EXPERTS, FAMILIES

FILTERS = ("attn", "attention", "mlp", "proj", "dense", "layers.0.", "layers.1.", "norm", "embed", "bias")
Strategy = st.SearchStrategy[Any]


def drawn(strategy: Strategy, count: int, number: int) -> list[Any]:
    """`count` examples; `number` decides which. The first that hypothesis makes is the simplest: left out."""
    examples: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count + 1,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        examples.append(example)

    collect()
    return examples[1 : count + 1]


def number(low: float, high: float) -> Strategy:
    """Numbers of three decimals."""
    return st.integers(round(low * 1000), round(high * 1000)).map(lambda n: n / 1000)


POSITIVE, SIGNED, FLAG = number(0.05, 1.5), number(-0.8, 1.5), st.booleans()


class Method(NamedTuple):
    """How a method's documents are drawn.

    Attributes:
        models: fewest and most models beside a base that differences are counted from.
        own, shared: values by name of a parameter; all but `weight` and `t` may be left out.
        base: "required", "optional", "input" (an input like the others, if it is named) or "none".
        bits: whether mergekit's bits are expected where no adapter takes part.
    """

    models: tuple[int, int]
    own: dict[str, Strategy] = {}  # noqa: RUF012
    shared: dict[str, Strategy] = {}  # noqa: RUF012
    base: str = "required"
    bits: bool = False


def gta(weight: Strategy, bits: bool = False, **own: Strategy) -> Method:
    """A relative of task arithmetic; `normalize` is drawn with weights that do not cancel only."""
    shared = {"lambda": number(0.2, 1.5), **({"rescale": FLAG} if own else {})}
    if weight is POSITIVE:
        shared["normalize"] = FLAG
    return Method((1, 3), {"weight": weight, **own}, shared, bits=bits)


DENSITY, THIN = number(0.1, 1.0), number(0.3, 0.7)
METHODS = {
    "linear": Method((2, 3), {"weight": POSITIVE}, {"normalize": FLAG}, base="input", bits=True),
    "slerp": Method((1, 1), {}, {"t": number(-0.2, 1.2)}),
    "nuslerp": Method(
        (2, 2), {"weight": POSITIVE}, {"nuslerp_flatten": FLAG, "nuslerp_row_wise": FLAG}, base="optional"
    ),
    "multislerp": Method((1, 3), {"weight": POSITIVE}, {"normalize_weights": FLAG}, base="optional"),
    "karcher": Method((2, 3), {}, {"max_iter": st.integers(0, 12)}, base="input"),
    "task_arithmetic": gta(SIGNED, bits=True),
    "ties": gta(POSITIVE, density=DENSITY),
    "dare_linear": gta(SIGNED, bits=True, density=DENSITY),
    "dare_ties": gta(SIGNED, bits=True, density=DENSITY),
    "della": gta(POSITIVE, bits=True, density=THIN, epsilon=number(0.0, 0.25)),
    "della_linear": gta(SIGNED, bits=True, density=THIN, epsilon=number(0.0, 0.25)),
    "breadcrumbs": gta(SIGNED, density=DENSITY, gamma=number(0.0, 0.2)),
    "breadcrumbs_ties": gta(SIGNED, density=DENSITY, gamma=number(0.0, 0.2)),
    "model_stock": Method((2, 3), {}, {"filter_wise": FLAG}),
    "sce": Method((1, 3), {}, {"select_topk": number(0.0, 1.0)}),
    "nearswap": Method((1, 1), {}, {"t": number(0.001, 0.05)}, bits=True),
    "arcee_fusion": Method((1, 1)),
    "ram": Method((1, 3), {}, {"epsilon": number(0.0, 0.02)}, bits=True),
    "ramplus_tl": Method(
        (1, 3),
        {},
        {"epsilon": number(0.0, 0.02), "r": number(0.0, 1.0), "alpha": number(0.0, 2.0)},
        bits=True,
    ),
    "passthrough": Method((1, 1), {"scale": number(-1.0, 1.5)}, base="none", bits=True),
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
# GPT-NeoX has rows of one entry, which have no rank in mergekit, and tensors equal in all models
NOT_NEOX = ("della", "della_linear", "multislerp")
REQUIRED = ("weight", "t")
# Without adapters: a threshold that an adapter's rounding can cross, or a generator that merging one moves on
PLAIN = (*RANDOM, "ram", "ramplus_tl", "arcee_fusion", "sce")


WHOLE = ("linear", "passthrough", "nearswap")  # merge models, not differences from a base


def has_bits(method: str, family: str) -> bool:
    """Whether mergekit's bits are expected of a method over full checkpoints.

    We keep a model as base + delta, which is the model's tensor exactly where delta is: for the numbers of
    16 bits, whose differences float32 holds, not always for those of 32.
    """
    return METHODS[method].bits and (method not in WHOLE or not family.endswith("f32"))


class File(NamedTuple):
    """A mergekit file: models have the names of the family's folders."""

    family: str
    documents: list[dict[str, Any]]

    @property
    def methods(self) -> set[str]:
        return {document["merge_method"] for document in self.documents}

    @property
    def adapted(self) -> bool:
        return any("+" in row["model"] for document in self.documents for row in document["models"])

    @property
    def bits(self) -> bool:
        """Whether every method gives mergekit's bits."""
        return not self.adapted and all(has_bits(method, self.family) for method in self.methods)


@st.composite
def value(draw: st.DrawFn, numbers: Strategy, whole: bool) -> Any:
    """A scalar, a gradient, or filters over those; `whole`: every tensor has a value."""
    gradient = st.one_of(numbers, st.lists(numbers, min_size=2, max_size=4))
    kind = draw(st.sampled_from(("scalar", "scalar", "gradient", "filters", "mapping")))
    if kind == "scalar":
        return draw(numbers)
    if kind == "gradient":
        return draw(gradient)
    row = st.fixed_dictionaries({"filter": st.sampled_from(FILTERS), "value": gradient})
    if kind == "mapping" and not whole:
        return draw(row)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    if whole or draw(st.booleans()):
        last = draw(st.sampled_from(({}, {"filter": "*"})))
        rows.append({**last, "value": draw(gradient)})
    return rows


@st.composite
def document(draw: st.DrawFn, method: str) -> dict[str, Any]:
    spec = METHODS[method]
    names = draw(st.permutations(EXPERTS))[: draw(st.integers(*spec.models))]
    if method not in PLAIN and draw(st.integers(0, 3)) == 0:
        names[-1] = draw(st.sampled_from(("base+lora", f"{names[-1]}+lora")))
    data: dict[str, Any] = {"merge_method": method}
    listed = False
    if spec.base == "required" or (spec.base == "optional" and draw(st.booleans())):
        data["base_model"] = "base"
        listed = draw(st.booleans())
    elif spec.base == "input":
        listed = draw(st.booleans())
        data |= draw(st.sampled_from(({}, {"base_model": "base" if listed else names[0]})))
    models: list[dict[str, Any]] = [{"model": name} for name in names]
    shared: dict[str, Any] = {}
    for key, numbers in spec.own.items():
        common = draw(st.booleans())
        if common or (listed and key in REQUIRED and spec.base == "input"):
            shared[key] = draw(value(numbers, key in REQUIRED))
            common = True
        elif key not in REQUIRED and draw(st.integers(0, 4)) == 0:
            continue
        for row in models:
            if not common or draw(st.booleans()):
                own = draw(value(numbers, key in REQUIRED and not common))
                row.setdefault("parameters", {})[key] = own
    for key, numbers in spec.shared.items():
        if key in REQUIRED or draw(st.booleans()):
            whole = key in REQUIRED
            shared[key] = draw(numbers if key == "max_iter" else value(numbers, whole))
    if listed:
        models.insert(draw(st.integers(0, len(models))), {"model": "base"})
    data["models"] = models
    return {**data, **({"parameters": shared} if shared else {}), "dtype": "float32"}


@st.composite
def in_family(draw: st.DrawFn, documents: list[dict[str, Any]]) -> File:
    """The documents over a family that mergekit can merge so (tests/parity/test_defects.py)."""
    names = sorted(FAMILIES)
    file = File("", documents)
    if file.adapted or file.methods & set(NOT_NEOX):
        names = [name for name in names if FAMILIES[name].architecture != "gpt_neox"]
    return File(draw(st.sampled_from(names)), documents)


@st.composite
def single(draw: st.DrawFn, method: str) -> File:
    """A file of one document."""
    data = draw(document(method))
    dtype = draw(st.sampled_from((None, None, "float32", "bfloat16", "float16")))
    return draw(in_family([{**data, **({"out_dtype": dtype} if dtype else {})}]))


@st.composite
def several(draw: st.DrawFn) -> File:
    """Two stages, and a document that selects from them by module or combines them."""
    methods = draw(st.lists(st.sampled_from(sorted(set(METHODS) - {"sce"})), min_size=2, max_size=2))
    names = ("stage_one", "stage_two")
    stages = [
        {"name": name, **draw(document(method)), "out_dtype": "float32"}
        for name, method in zip(names, methods, strict=True)
    ]
    text = draw(st.sampled_from(FILTERS))
    weights: list[Any] = [
        [{"filter": text, "value": 1.0}, {"value": 0.0}],
        [{"filter": text, "value": 0.0}, {"value": 1.0}],
    ]
    last: dict[str, Any] = {"merge_method": "linear", "base_model": "stage_one", "dtype": "float32"}
    if draw(st.booleans()):
        last |= {"merge_method": "task_arithmetic", "base_model": "base"}
        weights = [draw(value(SIGNED, True)) for _ in names]
    last["models"] = [
        {"model": name, "parameters": {"weight": weight}} for name, weight in zip(names, weights, strict=True)
    ]
    last["out_dtype"] = draw(st.sampled_from(("float32", "bfloat16")))
    documents = draw(st.permutations([*stages, last]))
    return draw(in_family(list(documents)))
