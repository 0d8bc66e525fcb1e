"""The console scripts: a signal ends them with one line from here on, before anything else is imported."""

from memtrain_common.interrupts import entrance

ablate = entrance("memtrain_apps.cli", "ablate", "ablate")
finetune = entrance("memtrain_apps.cli", "finetune", "finetune")
plan = entrance("memtrain_apps.cli", "plan", "plan")
pretrain = entrance("memtrain_apps.cli", "pretrain", "pretrain")
