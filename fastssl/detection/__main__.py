import sys

from fastssl.detection.train import main

sys.exit(main())
