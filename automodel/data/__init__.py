"""Rows, from files to batches.

The way of one row:

1. ``sources.py``: the section of the configuration names files or a data set of the hub, and which of its rows.
2. ``files/readers.py`` reads the row as a dict of fields, with its place for messages (``file:line``).
3. ``formats/choose.py`` recognises the format of the whole file from its first row, once.
4. ``formats/NAME.py`` reads the fields into a sample (``formats/samples.py``).
5. ``prepare/prepare_row.py`` hands the sample to the task, in one of several processes, and notes unread fields.
6. ``tasks/NAME.py`` (a room of its own) makes tokens and targets of the sample with ``prepare/tokenize.py``, which uses
   ``chat/`` for conversations, and cuts them to length.
7. ``prepare/writer.py`` writes them to the cache, with statistics; ``prepare/load.py`` maps them into memory. A stream
   (``batches/stream.py``) keeps a block of them in memory instead.
8. ``batches/loader.py`` draws the row in its turn, alone or in a pack.
9. ``batches/collate.py`` pads it into a batch.
"""
