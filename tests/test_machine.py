"""What the machine has left."""

import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

from fpq_jax._support.machine import free_device_memory, free_disk, free_host_memory, peak_memory, resident_memory


def test_memory_that_is_taken_is_seen():
    before = resident_memory()
    held = np.ones(200 * 2**20, np.uint8)
    assert 150 * 2**20 < resident_memory() - before < 300 * 2**20
    assert peak_memory() >= resident_memory() - 2**20
    del held
    assert free_host_memory() > 100 * 2**20


def test_a_limit_of_the_process_counts():
    code = "from fpq_jax._support.machine import free_host_memory; print(free_host_memory())"
    line = ["sh", "-c", f'ulimit -d {2 * 2**20} && exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 2 * 2**30


def test_a_disk_is_that_of_the_place_to_be(tmp_path):
    assert abs(free_disk(tmp_path / "not" / "yet") - shutil.disk_usage(tmp_path).free) < 2**30


def test_a_cpu_has_no_memory_of_its_own():
    jnp.zeros(3).block_until_ready()
    assert free_device_memory() is None
