"""Run the study from the repository's folder and write its page: `python -m tutorials.negation [MODEL]`."""

import sys
import time

from bilens.reproduce.reproduction import PEARCE_2025, Reproduction, Settings
from tutorials.negation.study import negation

start = time.monotonic()
made = negation(Settings(model=sys.argv[1] if len(sys.argv) > 1 else None))
study = Reproduction("negation", f"{PEARCE_2025}, figure 8 (section 5.1)", *made, seconds=time.monotonic() - start)
print(f"{study}\n{study.save('bilens_reproductions')} written")
