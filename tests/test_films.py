"""Decoding and geometry: every mode a film comes in, right way up, and everything that is no film refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from utils import films
from utils.films import UnusableFilm, decode_film, encode_png, prepare_film, to_square


def film_pixels(height: int = 96, width: int = 96) -> np.ndarray:
    """A smooth film, uint8 [H, W], 40 to 199, with a bright top left corner and a dark bottom right one."""
    rows, columns = np.mgrid[:height, :width]
    grey = (40 + 159 * (rows / height + 2 * columns / width) / 3).astype(np.uint8)
    grey[: height // 8, : width // 8] = 250
    grey[-(height // 8) :, -(width // 8) :] = 5
    return grey


def saved(tmp_path, image: Image.Image, name: str = "film.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def corner_means(grey: np.ndarray) -> tuple[float, ...]:
    """Mean of the top left, top right, bottom left and bottom right sixteenth."""
    height, width = grey.shape[0] // 16, grey.shape[1] // 16
    return (
        grey[:height, :width].mean(),
        grey[:height, -width:].mean(),
        grey[-height:, :width].mean(),
        grey[-height:, -width:].mean(),
    )


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_eight_bit_grey_survives_any_mode(mode, tmp_path):
    grey = film_pixels()
    path = saved(tmp_path, Image.fromarray(grey).convert(mode))
    np.testing.assert_array_equal(decode_film(path), grey)


def test_palette_is_looked_up(tmp_path):
    grey = film_pixels()
    image = Image.fromarray(255 - grey).copy()
    image.putpalette([level for index in range(256) for level in [255 - index] * 3])
    np.testing.assert_array_equal(decode_film(saved(tmp_path, image)), grey)


def test_one_bit_film_is_black_and_white(tmp_path):
    image = Image.fromarray(film_pixels() > 120)
    assert image.mode == "1"
    assert set(np.unique(decode_film(saved(tmp_path, image)))) == {0, 255}


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_are_black(mode, tmp_path):
    grey = film_pixels()
    alpha = np.full_like(grey, 255)
    alpha[:, :48] = 0
    alpha[:, 48:50] = 128
    image = Image.fromarray(grey).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    decoded = decode_film(saved(tmp_path, image))
    assert (decoded[:, :48] == 0).all()
    np.testing.assert_allclose(decoded[:, 48:50], grey[:, 48:50] / 2, atol=1)
    np.testing.assert_array_equal(decoded[:, 50:], grey[:, 50:])


@pytest.mark.parametrize(
    ("dtype", "suffix"), [("<u2", "png"), ("<u2", "tiff"), (">u2", "tiff"), ("<i4", "tiff"), ("<f4", "tiff")]
)
def test_deep_films_keep_their_grey_scale(dtype, suffix, tmp_path):
    grey = film_pixels()
    image = Image.fromarray((grey.astype(np.float64) * 16).astype(dtype))
    decoded = decode_film(saved(tmp_path, image, f"film.{suffix}"))
    expected = (grey.astype(float) - grey.min()) / (int(grey.max()) - int(grey.min())) * 255
    assert np.abs(decoded - expected).max() <= 1


@pytest.mark.parametrize("full_scale", [1000, 4095, 65535])
def test_deep_films_do_not_saturate(full_scale, tmp_path):
    rng = np.random.default_rng(0)
    levels = (rng.beta(2, 3, (256, 256)) * full_scale).astype(np.uint16)
    levels[:, :60] = 0  # collimated border
    levels[0, 100] = 65535  # dead pixel
    decoded = decode_film(saved(tmp_path, Image.fromarray(levels)))
    exposed = decoded[:, 60:]
    assert (exposed == 255).mean() < 0.005
    assert (exposed == 0).mean() < 0.005
    assert (decoded[:, :60] == 0).all()
    assert exposed.std() > 40  # the dead pixel has not squeezed the film into a few levels


def test_deep_tiff_in_which_white_is_zero_is_turned_round(tmp_path):
    levels = film_pixels().astype(np.uint16) * 200
    plain = decode_film(saved(tmp_path, Image.fromarray(levels), "plain.tiff"))
    turned = decode_film(saved(tmp_path, Image.fromarray(65535 - levels), "turned.tiff", tiffinfo={262: 0}))
    assert np.abs(plain.astype(int) - turned).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_exif_orientation_puts_the_marked_corner_back(orientation, suffix, tmp_path):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    grey = film_pixels(96, 128)
    stored = Image.fromarray(grey)
    if orientation in undo:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_film(saved(tmp_path, stored, f"film.{suffix}", exif=exif))
    assert decoded.shape == grey.shape
    assert np.abs(decoded.astype(int) - grey).mean() < 3


@pytest.mark.parametrize("shape", [(96, 96), (96, 110), (110, 96), (96, 200), (200, 96), (256, 256)])
def test_marked_corner_survives_preparation(shape, tmp_path):
    grey = film_pixels(*shape)
    png, noted = prepare_film(saved(tmp_path, Image.fromarray(grey)), 64)
    square = np.asarray(Image.open(io.BytesIO(png)))
    assert square.shape == (64, 64) and square.dtype == np.uint8
    assert (noted["height"], noted["width"]) == shape
    if noted["geometry"] == "pad":
        content = square[:, square.any(axis=0)][square.any(axis=1)]
        assert max(content.shape) == 64
        assert max(content.shape) / min(content.shape) == pytest.approx(max(shape) / min(shape), rel=0.05)
        square = content
    top_left, top_right, bottom_left, bottom_right = corner_means(square)
    assert top_left > 200 and bottom_right < 60
    assert 60 < bottom_left < top_right < 200


def test_a_square_of_the_right_size_is_unchanged():
    grey = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    square, geometry = to_square(grey, 128)
    np.testing.assert_array_equal(square, grey)
    assert geometry == "none"


def test_a_crop_without_resampling_takes_the_middle_bit_for_bit():
    grey = np.random.default_rng(0).integers(0, 256, (128, 149), dtype=np.uint8)
    square, geometry = to_square(grey, 128)
    np.testing.assert_array_equal(square, grey[:, 10:138])
    assert geometry == "crop"


@pytest.mark.parametrize(
    ("shape", "geometry"), [((100, 125), "crop"), ((100, 126), "pad"), ((125, 100), "crop"), ((126, 100), "pad")]
)
def test_long_films_are_padded_and_others_cropped(shape, geometry):
    square, chosen = to_square(np.full(shape, 100, dtype=np.uint8), 200)
    assert chosen == geometry
    assert square.shape == (200, 200)
    assert square.any(axis=0).all() == (chosen == "crop" or shape[1] > shape[0])


def test_upsampling_is_noticed():
    def is_upsampled(
        width: int, height: int, geometry: str, borders: tuple[int, int, int, int] = (0, 0, 0, 0)
    ) -> bool:
        return films.is_upsampled({"width": width, "height": height, "geometry": geometry, "borders": borders}, 512)

    assert is_upsampled(300, 256, "crop")
    assert is_upsampled(600, 511, "crop")
    assert is_upsampled(560, 560, "none", (30, 0, 30, 60))
    assert not is_upsampled(600, 300, "pad")
    assert not is_upsampled(512, 512, "none")


def bordered(grey: np.ndarray, left: int, top: int, right: int, bottom: int, level: int = 0) -> np.ndarray:
    """The film with borders around it, of one level but for the noise of a scanner."""
    around = np.pad(grey, ((top, bottom), (left, right)), constant_values=level).astype(int)
    inside = np.pad(np.ones_like(grey), ((top, bottom), (left, right)))
    noise = np.random.default_rng(0).integers(0, 4, around.shape)
    return np.where(inside, around, around + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("level", [0, 120, 250])
def test_borders_are_cut_off_and_the_film_is_not(level):
    grey = film_pixels()
    side = len(grey)
    assert films.find_borders(bordered(grey, 20, 20, 20, 20, level)) == (20, 20, 20, 20)
    assert films.find_borders(grey) == (0, 0, 0, 0)
    # Of what lies on two sides alone nothing goes: the rest would not be square, and the film itself would be cut
    assert films.find_borders(bordered(grey, 20, 0, 20, 0, level)[:, :side])[1::2] == (0, 0)
    cut = films.without_borders(bordered(grey, 30, 10, 10, 20, level), (30, 10, 10, 20))
    np.testing.assert_array_equal(cut, grey)


def test_of_a_border_as_much_stays_as_makes_the_film_square():
    wide = film_pixels()[: len(film_pixels()) * 3 // 4]
    height, width = wide.shape
    left, top, right, bottom = films.find_borders(bordered(wide, 16, 30, 16, 30))
    assert (left, right) == (16, 16)
    assert height + 60 - top - bottom == width
    square, geometry = films.to_square(
        films.without_borders(bordered(wide, 16, 30, 16, 30), (left, top, right, bottom)), 64
    )
    assert geometry == "none"


def test_a_marker_in_the_border_keeps_its_place():
    film = bordered(film_pixels(), 20, 20, 20, 20)
    film[4:14, 4:12] = 255
    assert max(films.find_borders(film)[:2]) <= 4


def test_a_film_that_was_prepared_before_keeps_its_padding(tmp_path):
    square, _ = films.to_square(film_pixels()[:40, :80], 128)
    path = saved(tmp_path, Image.fromarray(bordered(square, 20, 20, 20, 20)))
    assert prepare_film(path, 128)[1]["borders"] != [0, 0, 0, 0]
    assert prepare_film(path, 128, is_prepared=True)[1]["borders"] == [0, 0, 0, 0]


def test_borders_of_a_film_with_few_grey_levels_are_not_taken_for_wider_than_they_are():
    """In a film of 16 levels any line of lung is even within six of them."""
    grey = film_pixels() // 16
    assert films.find_borders(grey) == (0, 0, 0, 0)
    assert films.find_borders(np.pad(grey, 20)) == (20, 20, 20, 20)


def test_no_border_is_cut_off_that_leaves_too_little():
    assert films.find_borders(np.pad(film_pixels(40, 40), 30)) == (0, 0, 0, 0)


def write_on(grey: np.ndarray, text: str, at: tuple[int, int], size: int = 24) -> np.ndarray:
    image = Image.fromarray(grey)
    ImageDraw.Draw(image).text(at, text, fill=255, font=ImageFont.load_default(size=size))
    return np.asarray(image)


def test_words_are_seen_and_side_markers_are_not():
    grey = np.asarray(Image.fromarray(film_pixels()).resize((700, 700))) // 2
    assert not films.has_letters(grey)
    assert not films.has_letters(write_on(grey, "L", (600, 40)))
    for text, at in (("PORTABLE", (40, 300)), ("DOE JOHN 1947", (20, 20)), ("12:45", (560, 640))):
        assert films.has_letters(write_on(grey, text, at)), text


def test_a_png_whose_bytes_were_swapped_is_not_taken(tmp_path):
    """Pillow does not compare checksums when it decodes: now and then such a film would come out, and wrong."""
    whole = encode_png(film_pixels())
    (tmp_path / "a.png").write_bytes(whole)
    decode_film(tmp_path / "a.png")
    start = whole.index(b"IDAT") + 20
    for place in range(start, len(whole) - 40, 97):
        swapped = bytearray(whole)
        swapped[place], swapped[place + 1] = swapped[place + 1], swapped[place]
        if swapped != whole:
            (tmp_path / "a.png").write_bytes(swapped)
            with pytest.raises(UnusableFilm, match="cannot be decoded"):
                decode_film(tmp_path / "a.png")


def test_png_bytes_depend_on_pixels_only():
    grey = film_pixels()
    assert encode_png(grey) == encode_png(grey.copy())
    decoded = Image.open(io.BytesIO(encode_png(grey)))
    assert decoded.mode == "L" and not decoded.info
    np.testing.assert_array_equal(np.asarray(decoded), grey)


def test_colour_picture_is_refused_and_a_coloured_mark_is_not(tmp_path):
    picture = np.stack([film_pixels(), film_pixels()[::-1], film_pixels()[:, ::-1]], axis=-1)
    with pytest.raises(UnusableFilm, match="colour"):
        decode_film(saved(tmp_path, Image.fromarray(picture)))
    marked = np.repeat(film_pixels(200, 200)[..., None], 3, axis=-1)
    marked[90:100, 90:110] = (255, 0, 0)
    assert decode_film(saved(tmp_path, Image.fromarray(marked))).shape == (200, 200)


@pytest.mark.parametrize(("size", "reason"), [((63, 500), "smaller than 64 px"), ((9000, 9000), "too large")])
def test_absurd_sizes_are_refused(size, reason, tmp_path):
    with pytest.raises(UnusableFilm, match=reason):
        decode_film(saved(tmp_path, Image.new("1", size), compress_level=1))


def test_a_bomb_is_refused_by_its_header_alone(tmp_path):
    bomb = encode_png(film_pixels())
    header = bomb[:16] + (30000).to_bytes(4, "big") * 2 + bomb[24:29]
    (tmp_path / "bomb.png").write_bytes(header + zlib.crc32(header[12:29]).to_bytes(4, "big") + bomb[33:])
    with pytest.raises(UnusableFilm, match="too large"):
        decode_film(tmp_path / "bomb.png")


def test_a_film_in_sixteen_bits_a_colour_is_refused(tmp_path):
    """Pillow keeps the upper eight, which of a film of 12 bits are sixteen grey levels."""
    grey = film_pixels()
    lines = np.repeat(grey[:, :, None].astype(">u2") * 16, 3, axis=2)  # [H, W, 3]
    packed = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    parts = [
        (b"IHDR", struct.pack(">2I5B", grey.shape[1], grey.shape[0], 16, 2, 0, 0, 0)),
        (b"IDAT", packed),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    (tmp_path / "film.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(UnusableFilm, match="16 bits a channel"):
        decode_film(tmp_path / "film.png")


@pytest.mark.parametrize("image", [Image.new("L", (80, 80), 90), Image.new("I;16", (80, 80), 9000)])
def test_blank_films_are_refused(image, tmp_path):
    with pytest.raises(UnusableFilm, match="blank"):
        decode_film(saved(tmp_path, image))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
def test_a_film_cut_short_anywhere_is_refused(suffix, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (96, 96), dtype=np.uint8)
    whole = saved(tmp_path, Image.fromarray(noise), f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for share in (0.0, 0.01, 0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UnusableFilm, match="cannot be decoded"):
            decode_film(path)


def test_two_bytes_of_a_png_in_the_wrong_order_are_noticed(tmp_path):
    """Pillow alone returns wrong pixels for some."""
    whole = saved(tmp_path, Image.fromarray(film_pixels())).read_bytes()
    ends = whole.rindex(b"IEND") - 4
    for place in np.random.default_rng(0).permutation(np.arange(ends - 1))[:300]:
        pair = whole[place : place + 2]
        if pair[0] != pair[1]:
            (tmp_path / "swapped.png").write_bytes(whole[:place] + pair[::-1] + whole[place + 2 :])
            with pytest.raises(UnusableFilm, match="cannot be decoded"):
                decode_film(tmp_path / "swapped.png")


def test_what_is_no_film_is_refused(tmp_path):
    (tmp_path / "page.png").write_text("<html>not found</html>")
    with pytest.raises(UnusableFilm, match="cannot be decoded"):
        decode_film(tmp_path / "page.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UnusableFilm, match="cannot be decoded"):
        decode_film(tmp_path / "folder.png")
    with pytest.raises(UnusableFilm, match="not found"):
        decode_film(tmp_path / "absent.png")
    Image.fromarray(film_pixels()).save(tmp_path / "film.eps")
    with pytest.raises(UnusableFilm, match="cannot be decoded"):
        decode_film(tmp_path / "film.eps")


def test_damaged_films_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for suffix in ("png", "jpg", "tiff"):
        whole = np.frombuffer(
            saved(tmp_path, Image.fromarray(film_pixels()), f"whole.{suffix}").read_bytes(), dtype=np.uint8
        )
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes())
            try:
                decode_film(path)
            except UnusableFilm as fault:
                assert str(fault) in (
                    "cannot be decoded",
                    "too large",
                    "blank",
                    "colour picture",
                    "smaller than 64 px",
                )
