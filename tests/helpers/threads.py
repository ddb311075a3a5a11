"""Threads of the input pipeline."""

import threading


def is_prefetch_thread_alive():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]
