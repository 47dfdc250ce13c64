"""A sink that keeps what it is told."""


class Listening:
    name = "listening"

    def __init__(self):
        self.events = []
        self.before = None

    def start(self, task_names): ...

    def resume(self, events):
        self.before = list(events)

    def event(self, event):
        self.events.append(event)

    def finish(self, summary, task_names, R): ...

    def figures(self, paths): ...

    def close(self, failed): ...
