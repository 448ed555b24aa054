"""Check the layers of the package: imports only go from higher to lower layers."""

import pytest
from checkout import load

pytestmark = pytest.mark.source_tree

imports = load("imports", "scripts")


def test_no_import_points_upwards():
    assert len(imports.modules()) > 40
    assert (
        imports.floor("ops") < imports.floor("helmholtz.models") < imports.floor("training.step") < imports.floor("cli")
    )
    assert "helmholtz.objectives" in imports.imports("training.step")
    assert imports.upward() == []


def test_following_a_run_from_the_command_line_takes_few_levels():
    assert len(imports.longest_chain("cli")) <= 8
