"""The fixture `report`: a module's table of errors against float64, printed at its end. What takes a compiler is built ahead."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cuda import ahead, nvcc
from cuda.ptx.report import Report, print_report

BUILDS = pytest.StashKey[subprocess.Popen[bytes]]()


def here(item: pytest.Item) -> bool:
    return Path(__file__).parent in item.path.parents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These last, so that what they need is built by then."""
    items.sort(key=here)


def pytest_collection_finish(session: pytest.Session) -> None:
    found = {here(item) for item in session.items}
    if len(found) == 2 and nvcc.toolkit() is not None and not session.config.option.collectonly:
        session.config.stash[BUILDS] = ahead.begin()


def pytest_sessionfinish(session: pytest.Session) -> None:
    running = session.config.stash.get(BUILDS, None)
    if running is not None:
        ahead.end(running)


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    kept = Report()
    yield kept
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if capture and kept.rows:
        with capture.global_and_fixture_disabled():
            print_report(kept)
