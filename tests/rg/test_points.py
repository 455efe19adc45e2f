import pytest
import torch
import torch.nn.functional as F

from rg.points import COLORS, KEYPOINTS, LIMBS, check_visible, draw_skeletons, heatmaps, inside, peaks, rescale

IMAGE, MAPS = (64, 48), (32, 24)


def one_keypoint(x, y, *, number=0, visible=1.0):
    keypoints = torch.zeros(1, 1, 18, 3)
    keypoints[0, 0, number] = torch.tensor([x, y, visible])
    return keypoints


def scattered(count, *, margin=8.0, seed=0):
    """One person per image, visible all over, `margin` pixels from the border."""
    generator = torch.Generator().manual_seed(seed)
    room = torch.tensor([IMAGE[1] - 1 - 2 * margin, IMAGE[0] - 1 - 2 * margin])
    points = margin + room * torch.rand(count, 1, 18, 2, generator=generator)
    return torch.cat([points, torch.ones(count, 1, 18, 1)], -1)


def test_rescale_keeps_centres_and_borders():
    corners = torch.tensor([[-0.5, -0.5], [47.5, 63.5], [23.5, 31.5]])
    expected = torch.tensor([[-0.5, -0.5], [23.5, 31.5], [11.5, 15.5]])
    torch.testing.assert_close(rescale(corners, IMAGE, MAPS), expected)
    torch.testing.assert_close(rescale(torch.tensor([0.0, 0.0]), (4, 8), (2, 2)), torch.tensor([-0.375, -0.25]))


def test_rescale_there_and_back():
    points = torch.randn(5, 3, 2, dtype=torch.float64) * 100
    torch.testing.assert_close(rescale(rescale(points, (7, 13), (64, 48)), (64, 48), (7, 13)), points)


@pytest.mark.parametrize(("width", "resized", "mode"), [(12, 4, "area"), (12, 6, "bilinear"), (6, 24, "bilinear")])
def test_rescale_agrees_with_interpolate(width, resized, mode):
    """An image whose value is its own x, resized, holds at each pixel the x that this pixel came from."""
    ramp = torch.arange(width, dtype=torch.float32).expand(1, 1, 2, width)
    seen = F.interpolate(ramp, (2, resized), mode=mode)[0, 0, 0]
    columns = torch.arange(resized, dtype=torch.float32)
    origin = rescale(torch.stack([columns, columns], -1), (2, resized), (2, width))[:, 0]
    within = (origin >= 0) & (origin <= width - 1)  # bilinear upsampling repeats the border
    assert within.sum() > resized / 2
    torch.testing.assert_close(seen[within], origin[within])


def test_inside_is_the_pixels_with_their_half_borders():
    xs = torch.tensor([-0.51, -0.5, 0.0, 47.49, 47.5])
    assert inside(torch.stack([xs, torch.zeros(5)], -1), IMAGE).tolist() == [False, True, True, True, False]
    ys = torch.tensor([-0.51, -0.5, 0.0, 63.49, 63.5])
    assert inside(torch.stack([torch.zeros(5), ys], -1), IMAGE).tolist() == [False, True, True, True, False]


def test_heatmap_is_a_gaussian_in_cells():
    maps = heatmaps(one_keypoint(20.5, 30.5, number=3), IMAGE, MAPS, sigma=1.5)  # cell (10, 15)
    assert maps.shape == (1, 18, *MAPS)
    assert maps[0, 3].argmax() == 15 * MAPS[1] + 10
    assert maps[0, 3, 15, 10] == 1
    expected = torch.tensor(-(2**2 + 3**2) / (2 * 1.5**2)).exp()
    torch.testing.assert_close(maps[0, 3, 15 + 3, 10 - 2], expected)
    assert not maps[0, [k for k in range(18) if k != 3]].any()


def test_heatmaps_combine_people_by_maximum():
    first, second = one_keypoint(20.5, 30.5), one_keypoint(24.5, 30.5)
    both = heatmaps(torch.cat([first, second], 1), IMAGE, MAPS, sigma=1.0)
    assert torch.equal(both, torch.maximum(*(heatmaps(k, IMAGE, MAPS, sigma=1.0) for k in (first, second))))
    assert both.max() == 1


def test_an_invisible_keypoint_is_not_drawn():
    hidden = one_keypoint(20.5, 30.5, visible=0.0)
    assert not heatmaps(hidden, IMAGE, MAPS, sigma=1.0).any()
    shown = one_keypoint(40.0, 10.0)
    assert torch.equal(
        heatmaps(torch.cat([hidden, shown], 1), IMAGE, MAPS, sigma=1.0), heatmaps(shown, IMAGE, MAPS, sigma=1.0)
    )


def test_only_a_visible_keypoint_has_to_be_a_place():
    poses = torch.zeros(2, 1, 18, 3)
    poses[0, 0, 4, :2] = torch.nan
    check_visible(poses, "control")
    poses[1, 0, 3] = torch.tensor([torch.inf, 2, 1])
    with pytest.raises(ValueError, match=r"control: .*finite.*\[inf, 2\.0, 1\.0\] at \[1, 0, 3\]"):
        check_visible(poses, "control")


def test_peaks_inverts_heatmaps():
    keypoints = scattered(20)
    points, height = peaks(heatmaps(keypoints, IMAGE, MAPS, sigma=1.0), IMAGE)
    cells = (points - keypoints[:, 0, :, :2]) / 2
    assert cells.abs().max() < 0.1
    assert (height > 0.75).all() and (height <= 1).all()


def test_peaks_stays_within_a_cell_at_the_border():
    # The centre of mass sees one half of such a bump.
    keypoints = scattered(20, margin=0.0)
    points, _ = peaks(heatmaps(keypoints, IMAGE, MAPS, sigma=1.0), IMAGE)
    assert ((points - keypoints[:, 0, :, :2]) / 2).abs().max() < 0.7
    assert inside(points, IMAGE).all()


def test_peaks_ignores_what_is_far_from_the_highest():
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, 4, 2], maps[0, 0, 4, 6] = 1.0, 0.9
    points, height = peaks(maps, (9, 9))
    assert points.tolist() == [[[2.0, 4.0]]] and height.tolist() == [[1.0]]


def test_peaks_of_a_map_without_a_positive_value():
    maps = torch.full((1, 2, 4, 6), -2.0)
    maps[0, 1, 3, 1] = -1.0
    points, height = peaks(maps, (4, 6))
    assert points.tolist() == [[[0.0, 0.0], [1.0, 3.0]]]
    assert height.tolist() == [[-2.0, -1.0]]


def test_tables_fit_together():
    assert len(KEYPOINTS) == len(set(KEYPOINTS)) == len(COLORS) == len(set(COLORS)) == 18
    assert len(LIMBS) == len({frozenset(limb) for limb in LIMBS}) == 17
    assert {k for limb in LIMBS for k in limb} == set(range(18))  # a tree with 17 edges that touches every keypoint


def test_skeleton_has_the_colours_of_its_joints_and_limbs():
    keypoints = one_keypoint(10.0, 20.0, number=2)
    keypoints[0, 0, 3] = torch.tensor([30.0, 20.0, 1.0])  # right shoulder to right elbow: limb 2
    image = draw_skeletons(keypoints, IMAGE, IMAGE, width=3.0)[0]
    for number, x in ((2, 10), (3, 30)):
        torch.testing.assert_close(image[:, 20, x], torch.tensor(COLORS[number]) / 255)
    torch.testing.assert_close(image[:, 20, 20], torch.tensor(COLORS[LIMBS.index((2, 3))]) / 255 * 0.6)


def test_skeleton_is_as_wide_as_asked_on_exact_black():
    keypoints = one_keypoint(10.0, 20.0, number=2)
    keypoints[0, 0, 3] = torch.tensor([30.0, 20.0, 1.0])
    drawn = draw_skeletons(keypoints, IMAGE, IMAGE, width=5.0)[0].any(0)
    assert drawn[:, 20].nonzero().flatten().tolist() == [18, 19, 20, 21, 22]
    assert drawn[20].nonzero().flatten().tolist() == list(range(8, 33))
    image = draw_skeletons(scattered(4), IMAGE, IMAGE, width=2.0)
    assert image.min() == 0 and image.max() == 1
    assert (image == 0).all(1).float().mean() > 0.3  # floats compared with == : the sparse loss does too


def test_a_limb_with_an_invisible_end_is_not_drawn():
    keypoints = one_keypoint(10.0, 20.0, number=2)
    keypoints[0, 0, 3] = torch.tensor([30.0, 20.0, 0.0])
    alone = draw_skeletons(one_keypoint(10.0, 20.0, number=2), IMAGE, IMAGE, width=3.0)
    assert torch.equal(draw_skeletons(keypoints, IMAGE, IMAGE, width=3.0), alone)
    assert alone[0].any(0).nonzero().float().mean(0).tolist() == [20, 10]


def test_skeletons_do_not_depend_on_their_neighbours():
    keypoints = scattered(3)
    together = draw_skeletons(keypoints, IMAGE, MAPS, width=1.0)
    for i in range(3):
        assert torch.equal(together[i : i + 1], draw_skeletons(keypoints[i : i + 1], IMAGE, MAPS, width=1.0))


def test_a_skeleton_drawn_smaller_lies_where_the_points_are():
    keypoints = one_keypoint(20.5, 30.5, number=5)
    drawn = draw_skeletons(keypoints, IMAGE, MAPS, width=0.5)[0].any(0)
    assert drawn.nonzero().tolist() == [[15, 10]]
