"""What the server of ``ablate``'s processes loads before the first arm, quietly: libraries that arms share."""

from .quiet import quiet_libraries

quiet_libraries()

import matplotlib.figure  # noqa: E402, F401
import peft  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers.models.vit.modeling_vit  # noqa: E402, F401
