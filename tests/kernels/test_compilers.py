"""Which compilers are found, and for which GPUs they compile."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npc_ext.kernels import build, compilers, just_in_time

from .imitations import calls, imitated_compiler, imitated_nvcc, script


@pytest.mark.parametrize("kind", ["launcher", "masquerade", "clang", "arguments"])
def test_a_compiler_is_called_as_it_was_named_and_nvcc_gets_it_without_its_launcher(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = imitated_compiler(tmp_path / "bin" / "g++")
    # ccache runs the next program of the name that it was called by, or else the one that its arguments name.
    ccache = script(
        tmp_path / "tools" / "ccache",
        f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/ccache.log\n'
        f'case $0 in */ccache) exec "$@";; esac\nexec {tmp_path}/bin/"${{0##*/}}" "$@"\n',
    )
    masquerade = tmp_path / "masquerade" / "g++"
    masquerade.parent.mkdir()
    masquerade.symlink_to(ccache)
    clang = tmp_path / "bin" / "clang++"
    clang.symlink_to(compiler)
    monkeypatch.setenv("PATH", f"{masquerade.parent}:{ccache.parent}:{compiler.parent}:{os.environ['PATH']}")
    value, first, used = {
        "launcher": (f"ccache {compiler}", [str(ccache), str(compiler)], compiler),
        "masquerade": ("g++", [str(masquerade)], compiler),
        "clang": ("clang++", [str(clang)], clang),
        "arguments": (f"'{compiler}' -m64 -DA=1", [str(compiler), "-m64", "-DA=1"], compiler),
    }[kind]
    monkeypatch.setenv("CXX", value)
    assert compilers.compiler_command() == first
    flags = build.nvcc_flags(("90",))
    assert flags[flags.index("-ccbin") + 1] == str(used)
    build.build(tmp_path / build.MODULE_FILE, tmp_path / "objects", compilers.Cuda())
    assert all(" -shared " in line or " -c " in line for line in calls(compiler)) and calls(compiler)
    if kind in ("launcher", "masquerade"):
        assert (tmp_path / "ccache.log").read_text().startswith(first[0])
    before = just_in_time.cache_key()
    used.write_text(used.read_text() + "# another version\n")
    assert just_in_time.cache_key() != before


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ccache", "CXX=.*ccache begins with a launcher, but there is no compiler behind it"),
        ("ccache /nowhere/g++", "CXX=.* begins with a launcher, but /nowhere/g\\+\\+ is not a program"),
        ("g++ 'x", "CXX=g\\+\\+ 'x cannot be read as a command: No closing quotation"),
        ("/nowhere/g++ -m64", "CXX=/nowhere/g\\+\\+ -m64 does not name a program"),
    ],
)
def test_a_compiler_that_is_not_there_is_named(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{script(tmp_path / 'ccache', '#!/bin/sh').parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", value)
    with pytest.raises(compilers.BuildError, match=message):
        compilers.compiler_command()


@pytest.mark.parametrize(
    ("machine", "archs"),
    [
        ({"NPC_EXT_ARCHS": "80;90+PTX"}, ("80", "90+PTX")),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0a+PTX"}, ("80", "90a+PTX")),
        ({"NPC_EXT_ARCHS": "75", "TORCH_CUDA_ARCH_LIST": "8.0"}, ("75",)),
        ({"gpus": ("9.0", "8.0", "9.0")}, ("80", "90")),
        ({}, ("75", "80", "90", "100", "120+PTX")),
    ],
)
def test_architectures_are_those_asked_for_else_of_the_gpus_present_else_all(
    machine: dict[str, Any], archs: tuple[str, ...], imitate_machine: Callable[..., None]
) -> None:
    imitate_machine(**machine)
    assert compilers.architectures() == (archs, ())


def test_a_wrong_architecture_or_compiler_is_refused(imitate_machine: Callable[..., None], tmp_path: Path) -> None:
    def refused(message: str, **variables: str) -> None:
        imitate_machine(**variables)
        with pytest.raises(compilers.BuildError, match=message):
            compilers.cuda()

    nvcc = str(imitated_nvcc(tmp_path))
    no_entry = r"NPC_EXT_ARCHS=warp9 has the entry 'warp9'; expected .* '8.0;9.0\+PTX'"
    refused(no_entry, NPC_EXT_ARCHS="warp9", NPC_EXT_NVCC=nvcc)
    unknown = r"NPC_EXT_ARCHS=60;90 has 60, and \S+nvcc knows 75, 80, 90 only; change"
    refused(unknown, NPC_EXT_ARCHS="60;90", NPC_EXT_NVCC=nvcc)
    refused("NPC_EXT_NVCC=/nowhere/nvcc does not name a program", NPC_EXT_NVCC="/nowhere/nvcc")
    imitate_machine(NPC_EXT_NVCC="")
    assert compilers.nvcc() is None


@pytest.mark.parametrize(
    ("value", "archs", "said"),
    [
        ("6.0 7.0 8.0+PTX", ("80+PTX",), "has 60, 70, and {nvcc} knows 75, 80, 90 only; compiling for 80+PTX"),
        ("Ampere;Hopper+PTX", ("80", "90+PTX"), "has 86, and {nvcc} knows"),
        ("Turing;Hopper", ("75", "90"), ""),
        ("all", ("75", "80", "90+PTX"), ""),
        ("native", ("90",), ""),
        ("6.0;7.0", (), "left out: TORCH_CUDA_ARCH_LIST=6.0;7.0 has 60, 70, and {nvcc} knows 75, 80, 90 only"),
        ("warp 9", (), "left out: TORCH_CUDA_ARCH_LIST=warp 9 has the entry 'warp'; expected architectures"),
    ],
)
def test_torchs_list_of_architectures_is_taken_as_far_as_nvcc_knows_it(
    value: str, archs: tuple[str, ...], said: str, imitate_machine: Callable[..., None], tmp_path: Path
) -> None:
    nvcc = imitated_nvcc(tmp_path)
    imitate_machine(home=tmp_path, gpus=("9.0",), TORCH_CUDA_ARCH_LIST=value)
    plan = compilers.cuda()
    assert plan.archs == archs
    assert said.format(nvcc=nvcc) in "".join(plan.notices)
    assert bool(said) == bool(plan.notices)


def test_native_architectures_need_a_gpu(imitate_machine: Callable[..., None], tmp_path: Path) -> None:
    imitated_nvcc(tmp_path)
    imitate_machine(home=tmp_path, TORCH_CUDA_ARCH_LIST="native")
    reason = compilers.cuda().reason
    assert "TORCH_CUDA_ARCH_LIST=native asks for the GPUs of this machine, but there are none" in reason


def test_a_gpu_newer_than_nvcc_gets_ptx_and_an_older_one_a_sentence(
    imitate_machine: Callable[..., None], tmp_path: Path
) -> None:
    imitated_nvcc(tmp_path)
    for gpus, archs in [(("8.0", "12.0"), ("80", "90+PTX")), (("7.0",), ())]:
        imitate_machine(home=tmp_path, gpus=gpus)
        plan = compilers.cuda()
        assert plan.archs == archs
    assert plan.reason == "this machine has a GPU of sm_70, and its nvcc knows 75, 80, 90 only"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"library": False}, "libcudart_static.a is not with {nvcc}; install the whole CUDA toolkit"),
        ({"release": "11.8"}, "{nvcc} is older than CUDA 12.1"),
        ({"release": "unknown"}, "{nvcc} --version does not work (exit status 0: Cuda compilation tools"),
        (None, "CUDA_HOME={home} has no bin/nvcc"),
    ],
)
def test_a_toolkit_that_does_not_work_is_left_out_unless_it_was_asked_for(
    made: dict[str, Any] | None, reason: str, imitate_machine: Callable[..., None], tmp_path: Path
) -> None:
    nvcc = tmp_path / "bin" / "nvcc" if made is None else imitated_nvcc(tmp_path, **made)
    imitate_machine(home=tmp_path)
    plan = compilers.cuda()
    assert plan.nvcc is None
    assert reason.format(nvcc=nvcc, home=tmp_path) in plan.reason
    assert plan.notices == (f"the CUDA kernels are left out: {plan.reason}",)
    imitate_machine(home=tmp_path, NPC_EXT_NVCC=str(nvcc))
    with pytest.raises(compilers.BuildError, match=f"NPC_EXT_NVCC={nvcc}"):
        compilers.cuda()
    imitate_machine(home=tmp_path, NPC_EXT_ARCHS="90")
    with pytest.raises(
        compilers.BuildError, match=f"NPC_EXT_ARCHS asks for CUDA kernels, but .*{tmp_path}.*; fix that"
    ):
        compilers.cuda()


def test_another_toolkit_is_used_where_that_of_cuda_home_does_not_work(
    imitate_machine: Callable[..., None], tmp_path: Path
) -> None:
    nvcc = imitated_nvcc(tmp_path / "good")
    imitate_machine(home=tmp_path / "none", PATH=f"{nvcc.parent}:/usr/bin:/bin")
    plan = compilers.cuda()
    assert plan.nvcc == nvcc
    assert plan.notices == (f"CUDA_HOME={tmp_path / 'none'} has no bin/nvcc, so {nvcc} is used",)


def test_just_in_time_cuda_is_compiled_where_torch_has_it_and_for_the_gpu_that_is_there(
    imitate_machine: Callable[..., None], tmp_path: Path
) -> None:
    imitated_nvcc(tmp_path)

    def found(**machine: Any) -> compilers.Cuda:
        imitate_machine(home=tmp_path, TORCH_CUDA_ARCH_LIST="7.5 8.0 9.0", **machine)
        return compilers.cuda(just_in_time=True)

    assert found(gpus=("9.0",)).archs == ("90",)
    assert "torch was built without CUDA" in found(gpus=("9.0",), torch_cuda="cuda = None").reason
    assert "there is no GPU" in found().reason
    assert found(torch_cuda="cuda = None", NPC_EXT_ARCHS="80").archs == ("80",)


@pytest.mark.parametrize(
    ("line", "has_cuda"),
    [
        ("cuda: Optional[str] = '12.8'", True),
        ("cuda: Optional[str] = None", False),
        ('cuda = "13.0"', True),
        ("", False),
    ],
)
def test_whether_torch_has_cuda_is_seen_without_importing_it(
    line: str, has_cuda: bool, imitate_machine: Callable[..., None]
) -> None:
    imitate_machine(torch_cuda=line)
    reason = compilers.cuda(just_in_time=True).reason
    assert reason.startswith("there is no GPU here" if has_cuda else "this torch was built without CUDA")


def test_each_reason_to_leave_cuda_out_has_its_sentence(imitate_machine: Callable[..., None], tmp_path: Path) -> None:
    imitate_machine()
    assert compilers.why_no_nvcc() == "no nvcc was found (the CUDA toolkit, 12.1 or newer, has it)"
    imitate_machine(home=tmp_path)
    assert compilers.why_no_nvcc() == f"CUDA_HOME={tmp_path} has no bin/nvcc"
    imitated_nvcc(tmp_path)
    imitate_machine(home=tmp_path)
    assert compilers.why_no_nvcc() == ""
    imitate_machine(home=tmp_path, NPC_EXT_NVCC="")
    assert compilers.why_no_nvcc() == compilers.cuda().reason == "NPC_EXT_NVCC='' switches CUDA off"


def test_everything_that_is_missing_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    for module in ("ninja", "pybind11"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(compilers.BuildError) as refusal:
        compilers.check_tools()
    assert str(refusal.value).split("; ") == [
        "no C++ compiler: none of c++, g++, clang++ is on the PATH",
        "install one (for example 'apt install g++') or set CXX",
        "Python.h is missing in /nowhere",
        f"install Python's headers (for example 'apt install python3.{sys.version_info.minor}-dev')",
        "pybind11 is missing, and torch, which has the same headers, is not installed: pip install pybind11",
        "ninja is missing, which runs the compilers: pip install ninja",
    ]
