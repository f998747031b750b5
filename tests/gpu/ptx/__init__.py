from .launch import Buffer, launch, load, run_ptx
from .errors import *
