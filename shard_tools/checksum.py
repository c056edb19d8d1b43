"""The crc32 of zlib and PNG: by Intel's ISA-L, at ten times zlib's rate, wherever there is a wheel of it."""

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:
    from zlib import crc32 as crc32
