"""Callbacks when a module has been imported."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest

from tcompress.integrations.import_hook import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module and returns its name; imports and finders are undone afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    def write(text: str) -> str:
        (tmp_path / "hooked_module.py").write_text(text)
        importlib.invalidate_caches()
        return "hooked_module"

    yield write
    sys.modules.pop("hooked_module", None)


def test_after_the_import_and_once(module):
    name, calls, finders = module("def x():\n    return 1\n"), [], list(sys.meta_path)
    when_imported(name, lambda: calls.append(sys.modules[name].x()))
    importlib.import_module("colorsys")
    assert calls == []
    loaded = importlib.import_module(name)
    assert calls == [1]
    assert sys.meta_path == finders, "it leaves nothing behind"
    assert inspect.getsource(loaded.x) == "def x():\n    return 1\n"
    importlib.reload(loaded)
    assert calls == [1]


def test_at_once_where_it_is_loaded(module):
    name, calls, finders = module("x = 1"), [], list(sys.meta_path)
    importlib.import_module(name)
    when_imported(name, lambda: calls.append(1))
    assert calls == [1]
    assert sys.meta_path == finders


def test_an_import_that_fails_may_be_tried_again(module):
    name, calls = module("raise ValueError('broken')"), []
    when_imported(name, lambda: calls.append(1))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            importlib.import_module(name)
    assert calls == []
    module("working = True")
    importlib.import_module(name)
    assert calls == [1]


def test_a_module_that_does_not_exist(module):
    when_imported("hooked_module_missing", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hooked_module_missing")


def test_two_callbacks(module):
    name, calls = module("x = 1"), []
    when_imported(name, lambda: calls.append(1))
    when_imported(name, lambda: calls.append(2))
    importlib.import_module(name)
    assert sorted(calls) == [1, 2]
