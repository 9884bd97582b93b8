"""Fused attention kernels in Triton; README.md beside this file says how they are built and why.

Importing this package needs no Triton; importing one of its kernel modules does.
"""
