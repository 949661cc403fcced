"""Networks of the reference models; each is a `compand.eval.perception.models.TaskNetwork`."""
