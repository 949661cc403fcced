"""The tasks that come with compand; each module holds one `compand.eval.perception.task.Task`."""
