"""How long a user waits before anything runs: `import bilens` and `bilens --help` against a bare interpreter.

    python benchmarks/startup.py

Whole processes, interleaved, so that a slow moment of the machine hits every row alike; medians of `REPEATS`.
"""

import statistics
import subprocess
import sys
import time

REPEATS = 5
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import bilens": ["-c", "import bilens"],
    "bilens --help": ["-m", "bilens.cli", "--help"],
    "import torch": ["-c", "import torch"],
    "bilens.load_model (import only)": ["-c", "import bilens; bilens.load_model"],
    "import transformer_lens": ["-c", "import transformer_lens"],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{statistics.median(times):7.2f} s  {name}")


if __name__ == "__main__":
    main()
