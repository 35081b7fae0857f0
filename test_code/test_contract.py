"""The contract with the stock subpackage: every module, name, parameter and default of the installed nemo-toolkit.

``data/api_surface_*.json`` were read off the stock sources. Ours may add parameters and fields, after the stock ones
and with defaults. What any of the three versions has is there on each of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from importlib import metadata
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"
SURFACES = {v: json.loads((DATA / f"api_surface_{v}.json").read_text()) for v in ("2.5.3", "2.6.2", "2.7.3")}
# Another patch release of a minor version has its surface.
MINOR = ".".join(metadata.version("nemo-toolkit").split(".")[:2])
INSTALLED = next(version for version in SURFACES if version.startswith(f"{MINOR}."))
SURFACE = SURFACES[INSTALLED]

# Names a module has only for its annotations or its own arithmetic: nobody imports or patches them there.
NOISE = {
    "Any",
    "Callable",
    "Dict",
    "List",
    "Optional",
    "Tuple",
    "Union",
    "TYPE_CHECKING",
    "ABCMeta",
    "MethodType",
    "Path",
    "dataclass",
    "field",
    "nullcontext",
    "partial",
    "safe_import",
    "safe_import_from",
    "copy",
    "json",
    "os",
    "pprint",
    "re",
    "shutil",
    "tempfile",
}
# Imported by stock only if Transformer Engine or mamba-ssm is installed.
NOT_AT_RUN_TIME = {"get_gpt_modelopt_spec", "get_mamba_stack_modelopt_spec"}


def module_of(name):
    return importlib.import_module(name)


def cases(kind):
    return [
        pytest.param(module, name, entry, id=f"{module.removeprefix('nemo.collections.llm.modelopt')}.{name}")
        for module, content in SURFACE.items()
        for name, entry in content[kind].items()
    ]


def same_default(expected: str | None, actual, module) -> bool:
    if expected is None:
        return actual is inspect.Parameter.empty
    value = eval(expected, dict(vars(module)))  # noqa: S307 - defaults of a pinned file of ours
    return value == actual or repr(value) == repr(actual)


def check_parameters(expected: list[dict], function, module) -> None:
    actual = list(inspect.signature(function).parameters.values())
    # Our additions may stand before a final **kwargs.
    expected = [{**p, "default": p.get("default")} for p in expected]
    while expected and expected[-1]["kind"].startswith("var_"):
        last = expected.pop()
        assert any(p.name == last["name"] and p.kind.name.lower() == last["kind"] for p in actual)
    assert [p["name"] for p in expected] == [p.name for p in actual][: len(expected)]
    for want, have in zip(expected, actual, strict=False):
        assert want["kind"] == have.kind.name.lower(), have
        assert same_default(want["default"], have.default, module), (want, have)
    for extra in actual[len(expected) :]:
        variadic = extra.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        assert variadic or extra.default is not inspect.Parameter.empty, f"{extra} needs a default"


@pytest.mark.parametrize("module", SURFACE)
def test_module_and_its_public_names(module):
    ours = module_of(module)
    if SURFACE[module]["all"] is None and module != "nemo.collections.llm.modelopt":
        assert not hasattr(ours, "__all__"), "stock's star import gives every name"
    for name in SURFACE[module]["all"] or []:
        assert name in getattr(ours, "__all__", dir(ours))
        assert hasattr(ours, name)


@pytest.mark.parametrize("module", SURFACE)
def test_constants_and_collaborators_are_attributes(module):
    ours = module_of(module)
    names = set(SURFACE[module]["constants"]) | set(SURFACE[module]["imported_names"])
    missing = sorted(n for n in names - NOISE - NOT_AT_RUN_TIME - {"_"} if not hasattr(ours, n))
    assert missing == []


@pytest.mark.parametrize("module, name, entry", cases("functions"))
def test_function(module, name, entry):
    ours = module_of(module)
    function = getattr(ours, name)
    assert inspect.unwrap(function).__module__ == module
    check_parameters(entry["parameters"], function, ours)


@pytest.mark.parametrize("module, name, entry", cases("classes"))
def test_class(module, name, entry):
    ours = module_of(module)
    cls = getattr(ours, name)
    assert cls.__module__ == module
    for method, signature in entry["methods"].items():
        static = inspect.getattr_static(cls, method)
        if isinstance(static, property):  # the surface lists properties among the methods too
            assert method in entry["properties"]
            continue
        check_parameters(signature["parameters"], static.__get__(None, cls), ours)
    for prop in entry["properties"]:
        assert isinstance(inspect.getattr_static(cls, prop), property)


@pytest.mark.parametrize("module, name, entry", [c for c in cases("classes") if c.values[2]["dataclass"]])
def test_dataclass_fields(module, name, entry):
    ours = module_of(module)
    fields = dataclasses.fields(getattr(ours, name))
    assert [f["name"] for f in entry["fields"]] == [f.name for f in fields][: len(entry["fields"])]
    for want, have in zip(entry["fields"], fields, strict=False):
        default = have.default_factory() if have.default_factory is not dataclasses.MISSING else have.default
        if want["default"] is None:
            assert default is dataclasses.MISSING
        elif want["default"].startswith("field("):
            assert default == []
        else:
            assert same_default(want["default"], default, ours), (want, have)
    for extra in fields[len(entry["fields"]) :]:
        assert extra.default is not dataclasses.MISSING or extra.default_factory is not dataclasses.MISSING


@pytest.mark.parametrize("version", [version for version in SURFACES if version != INSTALLED])
def test_names_and_parameters_of_the_other_versions(version):
    for module, content in SURFACES[version].items():
        ours = module_of(module)
        expected = {*(content["all"] or []), *content["constants"], *content["functions"], *content["classes"]}
        assert sorted(name for name in expected - {"_"} if not hasattr(ours, name)) == []
        for name, entry in content["functions"].items():
            check_parameters(entry["parameters"], getattr(ours, name), ours)
        for name, entry in content["classes"].items():
            for method, signature in entry["methods"].items():
                if method not in entry["properties"]:
                    bound = inspect.getattr_static(getattr(ours, name), method).__get__(None, getattr(ours, name))
                    check_parameters(signature["parameters"], bound, ours)


def test_only_one_version_knows_wrapped_hugging_face_models():
    """``data/`` says it of the decoder type's annotation; NeMo says it by having the class or not."""
    signature = SURFACE["nemo.collections.llm.modelopt.quantization.quantizer"]["functions"][
        "get_modelopt_decoder_type"
    ]
    expects = "HFAutoModelForCausalLM" in signature["parameters"][0]["annotation"]
    assert expects == (INSTALLED == "2.5.3") == hasattr(module_of("nemo.collections.llm"), "HFAutoModelForCausalLM")
