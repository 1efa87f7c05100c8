"""Shenzhen No. 3 Hospital, China: 662 frontal films, half with tuberculosis, each with a line of diagnosis."""

from utils.films import Film
from utils.mirror import Mirror
from utils.sources.montgomery import list_readings

NAME = "shenzhen"
COUNT, SIZE, TEXT = "662", "3.8 GB", "readings"
LICENSE = "NLM: attribution"
RESTRICTED = False
TERMS = """\
The Shenzhen set is given by the National Library of Medicine, Bethesda, and Shenzhen No. 3 People's Hospital, Guangdong Medical
College, Shenzhen. Publications are to name them as its source and to cite Jaeger et al., "Automatic tuberculosis screening using
chest radiographs", and Candemir et al., "Lung segmentation in chest radiographs using anatomical atlases with nonrigid
registration", both IEEE Transactions on Medical Imaging 33(2), 2014. Its readings are diagnoses rather than descriptions."""
EXAMPLE = "python download.py --source shenzhen"

MIRROR = "https://openi.nlm.nih.gov/imgs/collections"
ARCHIVE = "ChinaSet_AllFiles.zip"


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of the set, by name, each of a patient of its own.

    Args:
        mirror: holds the zip archive as published or, a folder, the same unpacked.

    Raises:
        Refused: where there is neither, or no film in it.
    """
    return list_readings(mirror, ARCHIVE, NAME)
