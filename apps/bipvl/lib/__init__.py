"""BiPVL Label: the parts of the app. `main.py` wires them together."""

import warnings

# What MONAI says of its own code. No user can change it, and it would stand before anything of ours in a terminal.
for _message, _module in (
    (r"`torch\.jit\.interface` is deprecated", ""),  # monai.networks.nets.dints, when it is imported
    (r"Using a non-tuple sequence for multidimensional indexing", r"monai\.inferers\.utils"),
    (r"monai\.metrics\.utils get_mask_edges:always_return_as_numpy", r"monai\."),
):
    warnings.filterwarnings("ignore", message=_message, module=_module)
