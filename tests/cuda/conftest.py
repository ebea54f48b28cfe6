"""The fixture `report`: a module's table of errors against float64, printed at its end."""

from collections.abc import Iterator

import pytest

from cuda.ptx.report import Report, print_report


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    kept = Report()
    yield kept
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if capture and kept.rows:
        with capture.global_and_fixture_disabled():
            print_report(kept)
