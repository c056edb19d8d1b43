import sys

from fastssl.bench.main import main

sys.exit(main())
