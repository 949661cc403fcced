"""`compand eval speed`: how fast codecs encode and decode, in which stages, and in how much memory.

Every contender (`contenders`) runs in fresh processes (`worker`), one a round, in turns with the others (`runner`):
allocator settings and memory belong to a process, and what else the machine does meets all of them alike.
"""
