"""Code and pickles of strangers never run: every call that could load them says that it must not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

import pytest

from tests.conftest import ROOT
from tests.test_walls import project

# Classes whose `from_pretrained` is this project's own, and those that read nothing but JSON or an adapter.
OWN = {"Qwen3MoeForCausalLM", "FastQwen3Model", "FastQwen3MoeModel", "Fast", "Reference", "super()"}
# PEFT unpickles an adapter only if it has no safetensors, and then only tensors; torch_ref.strangers refuses it before.
HARMLESS = {
    "GenerationConfig",
    "Qwen3MoeConfig",
    "PeftModel",
    "peft.PeftModel",
    "pytest.importorskip('peft').PeftModel",
}
# (module, expression) -> why it may stand there
ALLOWED = {
    ("torch_ref.model", "trust_remote_code"): "passes on what its caller decides, by default False",
    ("tests.test_torch_ref_options", "True"): "tests that it is passed on",
    ("tests.test_torch_ref_options", "loader.from_pretrained"): "the same: wraps the loaders",
}
PICKLES = re.compile(r"(^|\.)(pickle|cPickle|dill|joblib|shelve|marshal)(\.|$)|^torch\.load$|^yaml\.(unsafe_)?load$")


def faults(code: Mapping[str, str]) -> list[str]:
    """Every call in `code` (module -> source) that could run what a checkpoint brings, as "module: call: why"."""
    return [f"{module}: {fault}" for module, source in code.items() for fault in _faults(module, ast.parse(source))]


def _faults(module: str, tree: ast.AST) -> Iterator[str]:
    foreign = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "transformers"
        for alias in node.names
    }
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if PICKLES.search(name):
                yield f"{name}: a pickle can run code"
            loads = node.attr in ("from_pretrained", "from_config") and (module, name) not in ALLOWED
            if loads and ast.unparse(node.value) not in (OWN - foreign) | HARMLESS:
                yield from _loader_faults(node, parents)
        if isinstance(node, ast.keyword):
            given = ast.unparse(node.value)
            if node.arg == "trust_remote_code" and given != "False" and (module, given) not in ALLOWED:
                yield f"trust_remote_code={given}: expected False"
            if node.arg == "allow_pickle" and given != "False":
                yield f"allow_pickle={given}: expected False"


def _loader_faults(loader: ast.Attribute, parents: Mapping[ast.AST, ast.AST]) -> Iterator[str]:
    """A loader of transformers must be called, or be an argument of `partial`, with the words that make it safe."""
    call = parents.get(loader)
    keywords = {word.arg: ast.unparse(word.value) for word in call.keywords} if isinstance(call, ast.Call) else {}
    name = ast.unparse(loader)
    if "trust_remote_code" not in keywords:
        yield f"{name}: expected trust_remote_code=False"
    reads_weights = loader.attr == "from_pretrained" and not re.search(r"Config$|Tokenizer", ast.unparse(loader.value))
    # Unsloth's own loader has no such option.
    if reads_weights and "FastLanguageModel" not in name and keywords.get("use_safetensors") != "True":
        yield f"{name}: expected use_safetensors=True"


def documented() -> dict[str, str]:
    """The examples in the documentation: page -> its Python."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S) for page in pages}
    return {page: "\n".join(found) for page, found in blocks.items() if found}


def test_no_call_runs_what_a_checkpoint_brings() -> None:
    assert faults(project().code | documented()) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("AutoTokenizer.from_pretrained(f)", "expected trust_remote_code=False"),
        ("transformers.AutoConfig.from_pretrained(f, trust_remote_code=True)", "trust_remote_code=True"),
        ("AutoConfig.from_pretrained(f, trust_remote_code=trust_remote_code)", "trust_remote_code=trust_remote_code"),
        ("AutoConfig.from_pretrained(f, **options)", "expected trust_remote_code=False"),
        ("AutoModel.from_pretrained(f, trust_remote_code=False)", "expected use_safetensors=True"),
        ("load = AutoModel.from_pretrained", "expected trust_remote_code=False"),
        ("cls.model_class.from_pretrained(f)", "expected use_safetensors=True"),
        (
            "from transformers import Qwen3MoeForCausalLM\nQwen3MoeForCausalLM.from_pretrained(f)",
            "use_safetensors=True",
        ),
        ("AutoModel.from_config(c)", "expected trust_remote_code=False"),
        ("np.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("torch.load(f)", "a pickle can run code"),
        ("pickle.loads(b)", "a pickle can run code"),
    ],
)
def test_a_planted_call_is_found(line: str, found: str) -> None:
    assert any(found in fault for fault in faults({"jaxmoe.planted": line}))
