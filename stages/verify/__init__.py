"""Does a cache still hold what its teacher says?"""
