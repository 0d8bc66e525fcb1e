"""The console scripts: a signal ends them with one line from here on, before anything else is imported."""

from memtrain_common.interrupts import entrance

train = entrance("backrazor.cli", "train", "backrazor-train")
glue = entrance("backrazor.cli", "glue", "backrazor-glue")
memory = entrance("backrazor.cli", "memory", "backrazor-memory")
