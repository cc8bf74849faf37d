"""Speed and memory beside what one would use instead: ``convatlas bench NAME``.

Every module but `ratio` has ``run(*, threads, quick) -> Report`` and is a benchmark by being there. Its bars are fixed
at the top of the module before anything is measured.
"""
