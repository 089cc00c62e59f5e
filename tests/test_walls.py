"""What may import what: the rooms of the project and their walls, checked for every import.

A new module needs one word in `MODULES`. A new room needs a line there and one in `USES`. Everything is read from the
source: imports inside functions count, and so does the `__init__` of a package that an import loads. Imports that only
type checkers see (`if TYPE_CHECKING`) do not count.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from tests.conftest import ROOT

LISTED = ("jaxmoe", "convert", "captures", "torch_ref", "peers")  # every module of these is in a room below
OTHERS = ("examples", "benchmarks", "notebooks", "reliability", "tests")  # one room each, whatever modules it has


def _under(package: str, names: str) -> set[str]:
    """Full names of modules of `package`; "." is the package itself."""
    return {package if name == "." else f"{package}.{name}" for name in names.split()}


# room -> its modules. The rooms stand in order: a room uses only rooms above it.
MODULES: dict[str, set[str]] = {
    "base": _under(
        "jaxmoe",
        ". broken_environment config cuda environment errors json_text lazy limited limited_worker lora other_fields"
        " out_of_memory presets stopping tokenizer_files weight_form",
    ),
    "parameters": _under("jaxmoe", "parameters"),
    "distributed": _under(
        "jaxmoe.distributed", ". agreement chunks collectives copy_engines ending launch mesh placement sharding"
    ),
    "memory": _under("jaxmoe", "memory memory_advice mesh_choice"),
    "cli": _under("jaxmoe.cli", ". arguments config_file notices progress xla"),
    "figures": _under("jaxmoe.figures", ". figure html_page output"),
    "metrics": _under("jaxmoe.routing", "metrics"),
    "store": _under(
        "jaxmoe.store",
        ". adapter boxes checkpoint converted digest element_sums expert_adapters files items loading lock recoded"
        " shares train_state",
    ),
    "forms": _under("jaxmoe", "quantized_stack"),
    "nf4": _under("jaxmoe.nf4", ". codec encode stack"),
    "fp8": _under("jaxmoe.fp8", ". codec encode stack"),
    "recode": _under("jaxmoe", "recode nf4.recode fp8.recode"),
    "convert": _under(
        "convert",
        ". __main__ adapters foreign_names forms fp8 hf2jax hub jax2hf mixed names nf4 not_finite peft_experts "
        "peft_served peft_settings pruned report safetensors_io saved_modules",
    ),
    "captures": _under("captures", ". format reader shared writer"),
    "ops": _under(
        "jaxmoe.ops",
        ". attention attention_chunked attention_context attention_context_cudnn attention_cudnn attention_masked"
        " cached_attention coded_products contraction dense_router dispatch embedding experts few_experts few_rows"
        " fp8_products frozen grouped_matmul implementations kept linear low_rank norm norm_rotary"
        " projections rotary router saliency schedule small_case swiglu"
        " kernels kernels.ampere kernels.cached_attention kernels.cached_attention_mosaic kernels.few_rows"
        " kernels.few_rows_decoding kernels.few_rows_mosaic kernels.flash"
        " kernels.flash.attention kernels.flash.backward kernels.flash.block kernels.flash.forward kernels.flash.tiles"
        " kernels.norm_rotary kernels.row_copies kernels.row_tiles kernels.swiglu_gradient kernels.top_experts"
        " kernels.grouped_matmul"
        " kernels.grouped_matmul.ampere kernels.grouped_matmul.ampere_block kernels.grouped_matmul.ampere_matmul"
        " kernels.grouped_matmul.ampere_outer kernels.grouped_matmul.ampere_tiles kernels.grouped_matmul.hopper"
        " kernels.grouped_matmul.hopper_decoding kernels.grouped_matmul.hopper_e4m3 kernels.grouped_matmul.hopper_fp8"
        " kernels.grouped_matmul.hopper_matmul kernels.grouped_matmul.hopper_nf4 kernels.grouped_matmul.hopper_outer"
        " kernels.grouped_matmul.hopper_ring kernels.grouped_matmul.hopper_thread kernels.grouped_matmul.hopper_tiles"
        " kernels.grouped_matmul.ragged"
        " kernels.grouped_matmul.xla",
    ),
    "model": _under(
        "jaxmoe.model", ". adapted cache causal_lm decoder init interface layer layer_loop mesh_flag opening selection"
    ),
    "data": _under(
        "jaxmoe.data",
        ". chat chat_flags compressed datasets_library extra forms inputs json_records mixture overview packing pairs"
        " raw record_forms records shared show sources stream tables",
    ),
    "control": _under(
        "jaxmoe.control", ". base_logits captured_text expert_choice interventions provenance replay router_bias"
    ),
    "generate": _under(
        "jaxmoe.generate",
        ". answer_file batches capture chat conversation engine processors prompt_file prompts sampling settings speed"
        " stream",
    ),
    "runs": _under("jaxmoe.runs", ". card history paired plots record report"),
    "train": _under(
        "jaxmoe.train",
        ". best compiled_steps data documents export host_memory identity log_probs loop loss metrics optimizers paired"
        " preferences prepare processes publish reference router_losses run_page samples settings speed step trackers"
        " watch",
    ),
    "evaluate": _under("jaxmoe.evaluate", ". arguments harness scoring stop_texts"),
    "routing": _under(
        "jaxmoe.routing", ". capture compare effects figures generation imported plots pruning report summary text"
    ),
    "doctor": _under("jaxmoe.doctor", ". cards nodes report"),
    "commands": _under(
        "jaxmoe",
        "__main__ cli.commands cli.umbrella data.__main__ doctor.__main__ evaluate.__main__ generate.__main__"
        " routing.__main__ routing.commands routing.commands.ab routing.commands.capture routing.commands.compare"
        " routing.commands.effects routing.commands.importing routing.commands.inputs routing.commands.prune"
        " routing.commands.report routing.commands.tables runs.__main__ train.__main__",
    ),
    "torch_ref": _under(
        "torch_ref",
        ". adapters capture checkpoint derivatives experts export fp8 kernels lora loss low_rank model patch quantize"
        " rotary shards strangers triton_programs",
    ),
    "peers": _under("peers", ". configs make_checkpoint reference"),
}

_BELOW_MODEL = "base parameters distributed memory forms nf4 fp8 recode store ops"
# room -> the rooms that it may use, beside itself
USES: dict[str, set[str]] = {
    "base": set(),
    "parameters": {"base"},
    "distributed": {"base", "parameters"},
    "memory": {"base", "parameters", "distributed"},
    "cli": {"base"},
    "figures": {"base"},
    "metrics": {"base"},
    "store": {"base", "parameters", "distributed"},
    "forms": {"base"},
    "nf4": {"base", "parameters", "forms"},
    "fp8": {"base", "parameters", "forms"},
    "recode": {"base", "parameters", "nf4", "fp8", "store"},
    "convert": {"base", "parameters", "memory", "nf4", "fp8", "recode", "store", "cli"},
    "captures": {"base", "cli"},
    "ops": {"base", "parameters", "distributed", "forms", "nf4", "fp8"},
    "model": {*_BELOW_MODEL.split()},
    "data": {"base", "figures"},
    "control": {*_BELOW_MODEL.split(), "model", "data", "captures"},
    "generate": {*_BELOW_MODEL.split(), "model", "data", "captures", "control", "cli"},
    "runs": {"base", "store", "figures", "cli"},
    "train": {*_BELOW_MODEL.split(), *"model data captures control metrics figures cli generate runs".split()},
    "evaluate": {*_BELOW_MODEL.split(), "model", "data", "generate", "control", "cli"},
    "routing": {*_BELOW_MODEL.split(), "model", "data", "captures", "control", "metrics", "figures", "generate"},
    "doctor": {*_BELOW_MODEL.split(), "model", "cli"},
    "commands": {*MODULES} - {"commands", "torch_ref", "peers"},
    "torch_ref": {"captures"},
    "peers": {"base", "parameters"},
    "examples": {*MODULES} - {"torch_ref", "peers"},
    "benchmarks": {*MODULES, "examples"},
    "notebooks": {*MODULES, "examples"} - {"torch_ref", "peers"},
    "reliability": {*MODULES} - {"torch_ref"},
    "tests": {*MODULES, "benchmarks", "examples", "notebooks", "reliability"},
}

# (module, module that its room may not use) -> why it does
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("jaxmoe.model.opening", "convert.hf2jax"): "opens a model folder in HF form",
    ("jaxmoe.model.opening", "convert.adapters"): "opens an adapter in PEFT's form",
    ("jaxmoe.train.export", "convert.hf2jax"): "writes what a run trained as an HF folder: reads the base model",
    ("jaxmoe.train.export", "convert.jax2hf"): "the same: writes the folder",
    ("jaxmoe.train.export", "convert.adapters"): "the same: merges the adapter, or writes it in PEFT's form",
    ("jaxmoe.train.export", "convert.saved_modules"): "the same: what the merged folder looks like",
    ("captures.reader", "jaxmoe.store.files"): "no link leads out of a folder",
    ("captures.writer", "jaxmoe.store.files"): "a folder appears whole or not at all",
    ("captures.shared", "jaxmoe.store.files"): "torch_ref writes such folders, too",
}

_ABOVE = {"peers", "tests", "examples", "benchmarks", "notebooks", "reliability"}
# package -> what no module of it imports, not even inside a function
NEVER = {
    "jaxmoe": _ABOVE | {"torch", "torch_ref", "peft", "bitsandbytes"},
    "torch_ref": _ABOVE | {"jax", "jaxlib", "flax", "optax", "orbax", "jaxmoe", "convert"},
    # both frameworks' sides read and write captures, so it loads neither
    "captures": _ABOVE | {"jax", "jaxlib", "flax", "torch", "torch_ref", "convert"},
    "convert": _ABOVE | {"torch", "torch_ref", "flax", "optax", "peft", "bitsandbytes"},
}
# These load the standard library only, and of jaxmoe only each other; inside a function they may import more.
STANDARD_LIBRARY_ONLY = _under(
    "jaxmoe",
    ". broken_environment cli cli.arguments cli.commands cli.config_file cli.progress cli.umbrella config cuda"
    " distributed distributed.mesh distributed.sharding environment errors json_text lazy limited lora memory"
    " memory_advice other_fields out_of_memory parameters presets stopping tokenizer_files weight_form",
)
# Pure functions over arrays, usable with any arrays. Imports inside functions are checked, too.
ARRAYS_ONLY = {"jaxmoe.routing.metrics": {"numpy", "scipy", "jaxtyping"}}


class Sources:
    """The source of every module of the project, and what each imports."""

    def __init__(self, sources: Mapping[str, str], packages: set[str]) -> None:
        """`sources` maps a module's full name to its code, `packages` are those that are an `__init__`."""
        self.code = dict(sources)
        self.packages = packages
        self._found: dict[str, list[tuple[str, bool]]] = {}
        self._homes: dict[str, dict[str, str]] = {}

    def planted(self, module: str, line: str) -> Sources:
        """The same with one line added to `module`, which is made where it does not exist."""
        changed = Sources(self.code | {module: f"{self.code.get(module, '')}\n{line}\n"}, self.packages)
        changed._found = {name: found for name, found in self._found.items() if name != module}
        changed._homes = {name: homes for name, homes in self._homes.items() if name != module}
        return changed

    def imports(self, module: str) -> list[tuple[str, bool]]:
        """(full name, whether it is imported inside a function) of everything that `module` imports."""
        if module not in self._found:
            self._found[module] = sorted(set(_imports(ast.parse(self.code[module]), module, False)))
        return self._found[module]

    def homes(self, package: str) -> dict[str, str]:
        """Public name -> module that defines it, of a package that re-exports with `jaxmoe.lazy.exports`."""
        if package not in self._homes:
            calls = [node for node in ast.walk(ast.parse(self.code[package])) if isinstance(node, ast.Call)]
            tables = [call.args[1] for call in calls if ast.unparse(call.func) == "exports"]
            self._homes[package] = ast.literal_eval(tables[0]) if tables else {}
        return self._homes[package]

    def own(self, module: str, *, loaded_only: bool = False) -> set[str]:
        """The project's modules that `module` imports, including those that define a name that a package re-exports.

        An import of a submodule also runs the `__init__` of its packages. A package that contains `module` is
        not listed for that.
        """
        found = set()
        for name, deferred in self.imports(module):
            if name.split(".")[0] not in (*LISTED, *OTHERS) or (loaded_only and deferred):
                continue
            target = name
            while target not in self.code and "." in target:
                target = target.rpartition(".")[0]
            found.add(target)
            if target in self.packages and target != name:
                home = self.homes(target).get(name.removeprefix(target + ".").split(".")[0])
                found |= set() if home is None else {home}
            above = target
            while "." in above:
                above = above.rpartition(".")[0]
                if module != above and not module.startswith(above + "."):
                    found.add(above)
        return found - {module}

    def foreign(self, module: str, *, loaded_only: bool = False) -> set[str]:
        """The top-level packages that `module` imports."""
        return {name.split(".")[0] for name, deferred in self.imports(module) if not (loaded_only and deferred)}


def _imports(node: ast.AST, module: str, deferred: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: relative import"
            # `from jaxmoe import memory` imports the module jaxmoe.memory.
            yield from ((f"{child.module}.{alias.name}", deferred) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), module, deferred)
        else:
            if isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                yield from ((str(a.value), deferred) for a in child.args[:1] if isinstance(a, ast.Constant))
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, module, deferred or is_function)


@functools.cache
def project() -> Sources:
    """Every module of the repository; a notebook is a module of its code cells."""
    code, packages = {}, set()
    for package in (*LISTED, *OTHERS):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
                packages.add(".".join(parts))
            code[".".join(parts)] = path.read_text(encoding="utf-8")
        for path in sorted((ROOT / package).glob("*.ipynb")):
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            lines = [
                line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).split("\n")
            ]
            # IPython's own commands are not Python
            code[f"{package}.{path.stem}"] = "\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in lines)
    return Sources(code, packages)


@functools.cache
def faults() -> set[str]:
    """What the three checks find in the repository: nothing, if their tests pass."""
    return {*unlisted(project()), *violations(project()), *circles(project())}


def room_of(module: str) -> str | None:
    """The room that `module` is listed in."""
    top = module.split(".")[0]
    if top in OTHERS:
        return top
    return next((room for room, modules in MODULES.items() if module in modules), None)


def unlisted(sources: Sources) -> list[str]:
    """The changes to `MODULES` that are needed so that it names each module of the listed packages once."""
    there = {module for module in sources.code if module.split(".")[0] in LISTED}
    rooms = {module: [room for room, modules in MODULES.items() if module in modules] for module in there}
    found = []
    for module in sorted(module for module, listed in rooms.items() if not listed):
        package, _, name = module.rpartition(".")
        beside = [room for room, modules in MODULES.items() if any(m.rpartition(".")[0] == package for m in modules)]
        where = f'MODULES["{beside[-1]}"]' if beside else "MODULES, as a room of its own"
        found.append(f'{module} is in no room: add "{name}" (below {package}) to {where}')
    listed = {module for modules in MODULES.values() for module in modules}
    found += [
        f'there is no module {module}: take it out of MODULES["{room_of(module)}"]' for module in sorted(listed - there)
    ]
    found += [f"{module} is in the rooms {' and '.join(listed)}" for module, listed in rooms.items() if len(listed) > 1]
    return found


def violations(sources: Sources) -> list[str]:
    """Every import that crosses a wall, as "module imports module: why it must not"."""
    found = []
    for module in sources.code:
        room, top = room_of(module), module.split(".")[0]
        if room is None:
            continue  # `unlisted` names it
        own, foreign = sources.own(module), sources.foreign(module)
        found += [f"{module} imports {name}: {top} never does" for name in sorted(foreign & NEVER.get(top, set()))]
        for target in sorted(own):
            used = room_of(target)
            if target.split(".")[0] in NEVER.get(top, set()) or (module, target) in EXCEPTIONS:
                continue
            if target not in sources.code:
                found.append(f"{module} imports {target}: there is no such module")
            elif used is None:
                continue  # `unlisted` names it
            elif used == room:
                is_room = target in sources.packages and module.startswith(target + ".") and target != "jaxmoe"
                found += [f"{module} imports {target}: inside a room import the submodule"] if is_room else []
            elif used not in USES[room] and not _only_its_package(target, own):
                found.append(
                    f'{module} imports {target}: add "{used}" to USES["{room}"], or ("{module}", "{target}") to '
                    "EXCEPTIONS, if DESIGN allows it"
                )
        if module in STANDARD_LIBRARY_ONLY:
            loaded = sources.foreign(module, loaded_only=True) - sys.stdlib_module_names - {"jaxmoe"}
            heavy = sources.own(module, loaded_only=True) - STANDARD_LIBRARY_ONLY
            found += [f"{module} imports {name}: it loads only the standard library" for name in sorted(loaded | heavy)]
        if module in ARRAYS_ONLY:
            strange = foreign - sys.stdlib_module_names - ARRAYS_ONLY[module]
            found += [f"{module} imports {name}: it takes arrays only" for name in sorted(strange)]
    return found


def _only_its_package(target: str, own: set[str]) -> bool:
    """Whether `target` is a package that is loaded only because a submodule of it is imported, such as jaxmoe.routing
    for jaxmoe.routing.metrics: the submodule is judged, and `circles` follows what the package's `__init__` loads."""
    return any(other.startswith(target + ".") for other in own)


def circles(sources: Sources) -> list[str]:
    """Every group of modules that import each other, each as one way round: "a -> b -> a"."""
    edges = {module: sorted(sources.own(module) & sources.code.keys()) for module in sources.code}
    reach = {module: _reachable(edges, module) for module in edges}
    found, seen = [], set()
    for module in sorted(edges):
        if module in reach[module] and module not in seen:
            seen |= {other for other in reach[module] if module in reach[other]}
            found.append(" -> ".join(_way_back(edges, module)))
    return found


def _reachable(edges: Mapping[str, list[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = list(edges[start])
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending += edges[module]
    return seen


def _way_back(edges: Mapping[str, list[str]], start: str) -> list[str]:
    """The shortest way along `edges` from `start` to itself."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:
        for target in edges[way[-1]]:
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    raise AssertionError(f"{start} is in no circle")


def _expect_none(found: list[str]) -> None:
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_every_module_is_in_one_room() -> None:
    _expect_none(unlisted(project()))


def test_imports_stay_inside_the_walls() -> None:
    _expect_none(violations(project()))


def test_no_circle_of_imports() -> None:
    _expect_none(circles(project()))


def test_the_table_is_in_order() -> None:
    """A room uses only rooms above it in the list, so rooms cannot form a circle; every exception is needed."""
    order = [*MODULES, *OTHERS]
    assert [*USES] == order
    assert [
        f"{room} uses {used}" for room in USES for used in USES[room] if order.index(used) >= order.index(room)
    ] == []
    needed = {pair for pair in EXCEPTIONS if pair[0] in project().code and pair[1] in project().own(pair[0])}
    assert {*EXCEPTIONS} - needed == set()


@pytest.mark.parametrize(
    ("module", "line", "wall"),
    [
        ("jaxmoe.train.loop", "def f():\n    import torch", "imports torch: jaxmoe never does"),
        ("jaxmoe.train.loop", "from torch_ref.loss import cross_entropy", "imports torch_ref: jaxmoe never does"),
        ("jaxmoe.train.loop", "def f():\n    from tests import oracle", "imports tests: jaxmoe never does"),
        ("jaxmoe.model.decoder", "def f():\n    from convert import names", "imports convert.names: add "),
        ("jaxmoe.model.decoder", "f = lambda: importlib.import_module('convert.names')", "imports convert.names: add "),
        ("jaxmoe.ops.linear", "from jaxmoe.model.decoder import forward", "imports jaxmoe.model.decoder: add "),
        ("jaxmoe.ops.linear", "from jaxmoe import memory", "imports jaxmoe.memory: add "),
        ("jaxmoe.ops.linear", "from jaxmoe.ops import linear", ""),
        (
            "jaxmoe.ops.linear",
            "from jaxmoe.ops import PRECISION",
            "imports jaxmoe.ops: inside a room import the submod",
        ),
        ("jaxmoe.store.files", "from jaxmoe.data import Record", "imports jaxmoe.data"),
        ("jaxmoe.store", "from jaxmoe.ops.linear import linear", "imports jaxmoe.ops.linear: add "),
        ("jaxmoe.ops.linear", "if TYPE_CHECKING:\n    from jaxmoe.model.decoder import forward", ""),
        ("jaxmoe.ops.linear", "if TYPE_CHECKING:\n    x = 1\nelse:\n    import torch", "imports torch: jaxmoe never"),
        ("jaxmoe.config", "import numpy", "imports numpy: it loads only the standard library"),
        ("jaxmoe.config", "def f():\n    import numpy", ""),
        ("jaxmoe.memory", "from jaxmoe.ops.linear import linear", "imports jaxmoe.ops.linear: it loads only the stand"),
        (
            "convert.names",
            "def f():\n    from jaxmoe.model.decoder import forward",
            "imports jaxmoe.model.decoder: add ",
        ),
        ("torch_ref.model", "import jax.numpy as jnp", "imports jax: torch_ref never does"),
        ("torch_ref.model", "def f():\n    import jaxmoe", "imports jaxmoe: torch_ref never does"),
        ("captures.format", "import torch", "imports torch: captures never does"),
        ("captures.format", "from jaxmoe.ops.router import route", "imports jaxmoe.ops.router: add "),
        ("jaxmoe.routing.metrics", "from captures import Capture", "imports captures: it takes arrays only"),
        ("jaxmoe.routing.metrics", "def f():\n    import jax", "imports jax: it takes arrays only"),
        ("benchmarks.limits", "def f():\n    from tests.oracle import forward", 'imports tests.oracle: add "tests"'),
        ("examples.demo", "import torch_ref", "imports torch_ref: add "),
        ("notebooks.1_quick_start", "from tests import oracle", 'imports tests.oracle: add "tests"'),
    ],
)
def test_a_planted_import_is_found(module: str, line: str, wall: str) -> None:
    found = set(violations(project().planted(module, line))) - faults()
    assert found if wall else not found
    assert not wall or any(each.startswith(f"{module} {wall}") for each in found), found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("jaxmoe.config", "def f():\n    from jaxmoe.parameters import parameter_specs"),
        ("jaxmoe.data", "def f():\n    from jaxmoe.train.loop import train"),
        ("jaxmoe.config", "from jaxmoe import Qwen3MoeForCausalLM"),
        ("tests.oracle", "import tests.test_config"),
        ("tests.conftest", "def f():\n    from tests.test_walls import project"),
    ],
)
def test_a_planted_circle_is_found(module: str, line: str) -> None:
    found = set(circles(project().planted(module, line))) - faults()
    assert any(f"{module} -> " in circle for circle in found), found


def test_an_unlisted_module_is_found() -> None:
    found = set(unlisted(project().planted("jaxmoe.ops.swish", ""))) - faults()
    assert found == {'jaxmoe.ops.swish is in no room: add "swish" (below jaxmoe.ops) to MODULES["ops"]'}
    found = set(unlisted(project().planted("jaxmoe.fp4.codec", ""))) - faults()
    assert found == {'jaxmoe.fp4.codec is in no room: add "codec" (below jaxmoe.fp4) to MODULES, as a room of its own'}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("jaxmoe", {"jax", "flax", "numpy", "transformers", "torch"}),
        ("jaxmoe.config", {"jax", "flax", "numpy", "transformers", "torch"}),
        ("jaxmoe.memory", {"jax", "flax", "numpy", "transformers", "torch"}),
        ("jaxmoe.model.decoder", {"torch", "transformers"}),
        ("convert", {"flax", "torch", "transformers"}),
        ("captures.shared", {"jax", "flax", "numpy", "torch", "transformers"}),
        ("torch_ref", {"numpy", "torch", "transformers"}),
        ("jaxmoe.routing.metrics", {"jax", "flax", "torch", "transformers", "captures"}),
        ("jaxmoe.routing.report", {"jax", "flax", "torch", "transformers"}),
    ],
)
def test_what_an_import_loads(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({{n.split('.')[0] for n in sys.modules}} & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_resolve() -> None:
    import jaxmoe

    assert {name: getattr(jaxmoe, name).__name__ for name in jaxmoe.__all__ if name != "__version__"} == {
        name: name for name in jaxmoe.__all__ if name != "__version__"
    }
    assert set(jaxmoe.__all__) <= set(dir(jaxmoe))
    with pytest.raises(AttributeError, match="has no attribute 'Qwen4'"):
        _ = jaxmoe.Qwen4  # pyright: ignore[reportAttributeAccessIssue]
