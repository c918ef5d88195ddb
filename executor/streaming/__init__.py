"""Layer streaming: decoder layers wait in host memory and pass through a few slots on the device.

Every streamed layer is one contiguous block of bytes, its *slab* (`slab`), in host memory (`arena`). The
device has two or three *slots* of a slab's size. `schedule` decides, without a device, which slab goes to
which slot and when; `link` makes the copies; `streamer` lets each layer find its bytes before it reads them.
Slabs that RAM has no room for stay on disk (`disk_tier`): threads read them into a few buffers of host memory
in the order of the schedule, ahead of the copies (`ring`, and `ring_schedule`, again without a device).
Modules see nothing of it: the data pointers of their parameters are moved from slot to slot (`residency`), so
transformers' modelling code, peft and bitsandbytes run as they are. `saved` and `linears` keep gradients
exact: nothing that waits for backward refers to a slot's memory, which holds another layer by then. `loading`
brings the weights in one layer at a time.
"""
