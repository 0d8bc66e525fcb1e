"""One run: ``finetune`` and ``pretrain``, and the workloads they train on."""
