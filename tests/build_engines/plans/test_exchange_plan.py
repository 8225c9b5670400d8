"""TensorRT's collective layer carries what ranks exchange: the plan of such a layer compiles, with these shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_split_by_heads_compiles_with_tensorrt_rtx(ranks: int) -> None:
    pytest.importorskip("tensorrt_rtx")
    script = Path(__file__).with_name("exchange_plan.py")
    done = subprocess.run([sys.executable, str(script), str(ranks)], capture_output=True, text=True, check=True)
    built = json.loads(done.stdout)
    assert built["heads"] == [1, 12 // ranks, 1560, 128]
    assert built["attended"] == [1560 // ranks, 12 * 128]
    assert built["collectives"] == 4
    assert built["plan_bytes"] > 0
