"""Exports read back, pixel by pixel, by readers of tools that are no part of the ``dev`` extra; skipped where they are not installed.

pip install --no-deps datumaro ultralytics orjson json-stream json-stream-rs-tokenizer imagesize lxml shapely cachetools ruamel.yaml
"""

import numpy as np
import pytest
from pycocotools import mask as rle
from test_export import SPACE, items, objects  # noqa: F401

from fmbseg.tools import export


@pytest.mark.parametrize("way", ["", "parts"])
@pytest.mark.parametrize("kind", ["coco", "coco-polygons", "voc"])
def test_datumaro_reads_coco_and_voc(items, tmp_path, kind, way):  # noqa: F811
    datumaro = pytest.importorskip("datumaro")
    if kind == "voc":
        export.export(items, SPACE, ["voc"], tmp_path, way)
        read = datumaro.Dataset.import_from(str(tmp_path / "voc"), "voc_instance_segmentation" if way else "voc_segmentation")
    else:
        export.export(items, SPACE, [kind], tmp_path / "annotations", way)
        (tmp_path / "images").symlink_to(items[0].image.parent.parent)
        read = datumaro.Dataset.import_from(str(tmp_path / "annotations" / f"{kind}.json"), "coco_instances")
    names, of_name = [label.name for label in read.categories()[datumaro.AnnotationType.label]], {}
    for one in read:
        of_name[one.id.split("/")[-1]] = one.annotations
    for item in items:
        seen = np.zeros(item.read().shape, int)
        boxes, made = datumaro.AnnotationType.bbox, of_name[item.name]
        made = [one for one in made if one.type != boxes and names[one.label] != "background"]
        for one in made:
            polygon = one.type == datumaro.AnnotationType.polygon
            mask = rle.decode(rle.frPyObjects([one.points], *seen.shape))[..., 0] if polygon else np.asarray(one.image)
            assert not seen[mask.astype(bool)].any()
            seen[mask.astype(bool)] = SPACE.names.index(names[one.label])
        if kind == "voc" and way:  # the smallest of the noise are left out
            assert len(made) == min(export.MOST_IDS, sum(1 for _ in item.objects(SPACE, way)[1]))
            assert (seen == objects(item))[seen > 0].all()
        else:
            np.testing.assert_array_equal(seen, objects(item))


@pytest.mark.parametrize("way", ["", "sam"])
def test_ultralytics_reads_yolo(items, tmp_path, monkeypatch, way):  # noqa: F811
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("YOLO_OFFLINE", "True")
    pytest.importorskip("ultralytics")
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset, polygon2mask

    export.export(items, SPACE, ["yolo"], tmp_path, way)
    data = check_det_dataset(str(tmp_path / "yolo" / "data.yaml"))
    assert data["names"] == {0: "person", 1: "cat", 2: "bird"}
    read = YOLODataset(img_path=data["train"], data=data, task="segment", augment=False)
    of_name = {one["im_file"].rsplit("/", 1)[-1].split(".")[0]: one for one in read.get_labels()}
    for item in items:
        one, seen = of_name[item.name], np.zeros(item.read().shape, np.uint8)
        for k, shares in zip(one["cls"][:, 0], one["segments"]):
            mask = polygon2mask(seen.shape, [(shares * seen.shape[::-1]).ravel()])
            seen[mask.astype(bool)] = k + 1
        np.testing.assert_array_equal(seen, objects(item))
