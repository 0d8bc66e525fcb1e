"""The console scripts: a signal ends them with one line from here on, before anything else is imported."""

from memtrain_common.interrupts import entrance

main = entrance("galore_vit.cli", "main", "galore-vit")
