"""Memory, from first principles: the tensors a run allocates, when it lets them go, and the peak in
between."""
