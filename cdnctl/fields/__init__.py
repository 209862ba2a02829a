"""Physical fields, which are no photographs: simulated, modelled scale by scale, sampled."""
