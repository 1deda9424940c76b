"""Where settings come from, and that each says so."""

from pathlib import Path

import pytest

from hvctl import settings as module
from hvctl.errors import UsageError
from hvctl.settings import load_settings


@pytest.fixture(autouse=True)
def no_system_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYSTEM_CONFIG", tmp_path / "system.toml")


def test_order_file_user_environment_flag(tmp_path: Path) -> None:
    (tmp_path / "system.toml").write_text('reserve_memory = "2GiB"\ncpu_overcommit = 2.0\nlock_wait = 1\n')
    user = tmp_path / "xdg" / "hvctl"
    user.mkdir(parents=True)
    (user / "config.toml").write_text("cpu_overcommit = 3.0\nlock_wait = 2\n")
    env = {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HVCTL_LOCK_WAIT": "3", "LIBVIRT_DEFAULT_URI": "qemu:///session"}
    found = load_settings({"uri": "qemu:///system"}, env)
    assert (found.reserve_memory, found.cpu_overcommit, found.lock_wait) == (2 << 30, 3.0, 3.0)
    assert found.uri == "qemu:///system"
    assert found.origins["uri"] == "command line"
    assert found.origins["lock_wait"] == "HVCTL_LOCK_WAIT"
    assert found.origins["reserve_memory"].endswith("system.toml")
    assert "state_dir" not in found.origins


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense = 1\n", "nonsense"),
        ("lock_wait = 'soon'\n", "lock_wait"),
        ("reserve_memory = 5\n", "unit"),
        ("=", "TOML"),
    ],
)
def test_wrong_files_are_usage_errors(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "system.toml").write_text(text)
    with pytest.raises(UsageError, match=said):
        load_settings({}, {})
