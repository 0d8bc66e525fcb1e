"""A processor that announces AMX and does not run it, as some virtual machines have it.

oneDNN believes the announcement, and the first bfloat16 product ends the process by an illegal instruction. So the
product is tried in a process of its own first, and where that one dies, oneDNN is told to do without AMX.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_TRIAL = "import torch; a = torch.ones(2, 16, 32, dtype=torch.bfloat16); a @ a.mT"
_CAP = "ONEDNN_MAX_CPU_ISA"


def avoid_broken_amx(say: Callable[[str], None] = print) -> bool:
    """Try a bfloat16 product where the processor announces AMX; -> whether oneDNN was told to do without.

    Call it before this process multiplies anything: oneDNN reads the setting once.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if _CAP in os.environ or not cpuinfo.exists() or "amx_bf16" not in cpuinfo.read_text():
        return False
    if subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True).returncode == 0:
        return False
    os.environ[_CAP] = "AVX512_CORE_FP16"
    say("this processor announces AMX but does not run it: bfloat16 goes through AVX-512 instead")
    return True
