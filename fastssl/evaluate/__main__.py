import sys

from fastssl.evaluate.main import main

sys.exit(main())
