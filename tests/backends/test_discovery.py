"""Device discovery: the CPU as it is, and plugins that are missing, broken, mute or crash, each with its reason."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from trustcore_xla import discovery, tryout

from trustcore.backend import PlatformReport

TIMEOUT = 120.0


def probe(platform: str, timeout: float = TIMEOUT) -> PlatformReport:
    (report,) = discovery.probe(timeout=timeout, platforms=[platform])
    return report


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that installs a PJRT plugin whose `initialize` has the given body."""

    def install(name: str, body: str) -> None:
        folder = tmp_path / "jax_plugins" / name
        folder.mkdir(parents=True)
        source = "import os, signal, sys, time\n\ndef initialize():\n" + textwrap.indent(textwrap.dedent(body), "    ")
        (folder / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


def test_cpu_devices_memory_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    report = probe("cpu")
    assert report.usable and report.reason == ""
    assert [device.id for device in report.devices] == list(range(8))
    assert {device.kind for device in report.devices} == {"cpu"}
    assert report.memory_bytes == tryout.host_memory()
    assert report.memory_bytes is not None and report.memory_bytes > 1 << 28
    assert {"float32", "bfloat16", "float16", "float64", "int8", "int4"} <= set(report.dtypes)


def test_a_platform_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "installed_plugins", dict)
    report = probe("cuda")
    assert not report.usable
    assert report.reason.startswith("not installed: pip install")
    assert report.devices == () and report.dtypes == ()


def test_every_known_platform_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(discovery, "installed_plugins", lambda: {"xla_cuda13": "cuda", "abacus": "abacus"})

    def one(platform: str, plugins: dict[str, str], timeout: float) -> PlatformReport:
        asked.append(platform)
        return PlatformReport(platform, usable=False, reason=f"{plugins} {timeout}")

    monkeypatch.setattr(discovery, "_probe_one", one)
    discovery.probe(timeout=1)
    assert asked == ["cpu", "cuda", "rocm", "tpu", "metal", "abacus"]


@pytest.mark.parametrize(
    ("name", "platform"),
    [("xla_cuda13", "cuda"), ("jax_rocm7", "rocm"), ("metal_plugin", "metal"), ("abacus", "abacus")],
)
def test_plugins_are_found_by_name(plugin, name: str, platform: str) -> None:
    plugin(name, "raise AssertionError('looking must not import')")
    assert discovery.installed_plugins()[name] == platform


def test_a_plugin_that_fails_says_why(plugin) -> None:
    plugin("abacus", "raise RuntimeError('beads are missing')")
    report = probe("abacus")
    assert not report.usable
    assert report.reason.startswith("does not start: ")
    assert "beads are missing" in report.reason


def test_a_plugin_without_hardware_has_no_device(plugin) -> None:
    plugin("abacus", "raise RuntimeError('CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected')")
    assert probe("abacus").reason.startswith("no device: ")


def test_a_plugin_that_hangs_is_given_up(plugin) -> None:
    plugin("abacus", "time.sleep(600)")
    report = probe("abacus", timeout=4)
    assert not report.usable
    assert report.reason == "does not answer: nothing after 4 s"


def test_a_plugin_that_kills_its_process_is_survived(plugin) -> None:
    plugin("abacus", "print('about to die', file=sys.stderr, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    report = probe("abacus")
    assert not report.usable
    assert "killed by signal 9" in report.reason and "about to die" in report.reason


def test_noise_of_drivers_on_stdout_is_passed_over(plugin) -> None:
    plugin("abacus", "print('{driver banner}', flush=True)")
    assert probe("cpu").usable


def test_a_dtype_that_is_not_there_does_not_work() -> None:
    import jax

    device = jax.devices("cpu")[0]
    assert tryout.works("float32", device)
    assert not tryout.works("float3", device)


def test_a_device_that_answers_wrongly_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    monkeypatch.setattr(jax, "jit", lambda program: lambda x, y: program(x, y) + 1)
    assert not tryout.works("float32", jax.devices("cpu")[0])
