"""What the server of ``arms`` loads before the first arm, so that no arm loads it again. Importing this is slow."""

from memtrain_common.commands.quiet import quiet_libraries

quiet_libraries()

import matplotlib.figure  # noqa: E402, F401
import peft  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401  # every optimizer loads it at its first use
import transformers.models.vit.modeling_vit  # noqa: E402, F401

from ..compose import compose  # noqa: E402, F401
from ..run import finetune, pictures, training  # noqa: E402, F401
