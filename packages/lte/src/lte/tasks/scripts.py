"""The console scripts: a signal ends them with one line from here on, before anything else is imported."""

from memtrain_common.interrupts import entrance

train = entrance("lte.cli", "main", "lte-train")
prepare = entrance("lte.tasks.prepare", "main", "lte-prepare")
sample = entrance("lte.tasks.sample", "main", "lte-sample")
bench = entrance("lte.tasks.bench", "main", "lte-bench")
export = entrance("lte.tasks.export", "main", "lte-export")
