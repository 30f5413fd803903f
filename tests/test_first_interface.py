"""The import paths and scripts under which the library was first asked for."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_reexports_are_the_same_objects() -> None:
    import bkcore
    from src.models import complex_quantization, quantized_birman_schwinger, resnet_bk

    for module in (complex_quantization, quantized_birman_schwinger, resnet_bk):
        public = [name for name in vars(module) if name[0].isupper() or name.startswith("create")]
        assert public
        for name in public:
            assert getattr(module, name) is getattr(bkcore, name)


def test_demo_script_runs() -> None:
    script = ROOT / "examples" / "quantized_birman_schwinger_demo.py"
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    for mode in ("ptq_int8", "qat_int8", "ptq_int4", "qat_int4"):
        assert mode in result.stdout
