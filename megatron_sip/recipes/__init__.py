"""Whole configurations by name, with the paper's settings; `python -m megatron_sip.recipes NAME` prints one."""
