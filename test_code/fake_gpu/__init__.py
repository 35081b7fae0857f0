"""A GPU without data: tests that see mixes of devices and waits for the device on a machine without a GPU.

The CPU backend cannot see either: every tensor is on the CPU there, and reading a number costs nothing. Here
``device="cuda"`` means a device of its own. Its tensors have shapes, types and an autograd graph, but no numbers
(``FakeTensorMode`` on torch's ``PrivateUse1`` device), so they need no memory: models of any size run, as any rank of a
group of any size, because the collectives are fake as well and only check their arguments.

What is seen, and is an error unless a test counts it:

- a mix of devices, such as a sum of a tensor on the GPU and ``torch.ones(3)``: torch's own error;
- a wait of the host for the device (`device.HostSync`): ``item``, ``tolist``, ``bool``, ``cpu``, copies from the host
  that are not pinned, indices whose size depends on the data.

`device.py` is the device, which changes torch for good: `conftest.py` starts a process of its own for it, in which the
jobs of the tests run, the functions in ``jobs_*.py``.

Limits: there are no numbers, so a control flow that depends on them cannot be followed (`device.count` answers as if
all were well); no kernels of Transformer Engine and Triton; no streams; a collective that not all ranks join is not
seen. Tensors of the host keep their numbers.
"""
