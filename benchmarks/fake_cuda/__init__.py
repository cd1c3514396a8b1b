"""CUDA without a GPU: tensors on it have shapes and no values, and what is done to them is counted.

``guard.load()``, before torch is imported, and ``device.install()`` make torch believe that there
is one GPU; ``mode.Counting`` runs operators on tensors without values and counts; nothing runs on
the events and streams of ``streams``.
"""
