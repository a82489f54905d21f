"""Meshes by name; what is done on them is tested where it is done."""

import jax
import pytest

from fpq_jax import FpqError
from fpq_jax._support.mesh import check_mesh, make_mesh, mesh_text, parse_mesh


def test_a_mesh_by_its_text():
    for text in (None, "data=1", "model=1", "data=1,model=1"):
        mesh = parse_mesh(text)
        check_mesh(mesh)
        assert mesh_text(mesh) == "data=1,model=1"


@pytest.mark.parametrize("text", ["", "data", "data=x", "data=1,data=1", "rows=2", "data=-1"])
def test_a_text_that_is_no_mesh_is_said(text):
    with pytest.raises(FpqError, match="write it as data=4,model=2"):
        parse_mesh(text)


def test_meshes_that_cannot_be_are_said():
    with pytest.raises(FpqError, match="needs 512 devices"):
        make_mesh(256, 2)
    with pytest.raises(FpqError, match="empty"):
        parse_mesh("data=0")
    with pytest.raises(FpqError, match="make_mesh"):
        check_mesh(jax.sharding.Mesh(jax.devices()[:1], ("x",)))
