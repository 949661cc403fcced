"""What --plugin names for the task of `texture_task`, which is imported where a task is needed, not where files are
decoded: it brings torch along."""

from compand.eval.perception import task

task.register("texture", "texture_task:Texture")
