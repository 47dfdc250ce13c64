"""SHA-256 of CL_Benchmark's rows, as ``[[sentence, label], ...]`` in JSON, by task and file.

Of O-LoRA's repository at commit 07117e1; the six files that are missing here (training data of
dbpedia and yahoo, test data of yahoo, yelp, IMDB and MultiRC) are in no snapshot that we have seen.
"""

from collections.abc import Mapping

PINNED: Mapping[tuple[str, str], str] = {
    ("dbpedia", "test"): "933ecac35d0d145e62f420e3cd2fae0cc95a5a850ce1ee5f12702e09aeaf01bb",
    ("agnews", "train"): "fd5c8fc43457c6e8a865e2e897ab887a490cdac5cb521833dd7071ede669a1ad",
    ("agnews", "test"): "c3ec8553c1709f6ba6d4891fb955583ebdb49e1331d93c94c7b59e64526faba6",
    ("amazon", "train"): "f060168a778e148a2f125905a563e1d4c32b4b6a26ce156c4e737b6a57757e7c",
    ("amazon", "test"): "2aff7926564530d65f0433553599ab1a194f499356721e577922e55831455098",
    ("yelp", "train"): "0aa385da68b689c19afd667023d8cb02aad2dc79536dee7ffa3e3d8d9ff2166a",
    ("IMDB", "train"): "4aa12339ff83760e4a58908fed4bcd189e2af7a2bd8c7816da2dc4a5a9e55d4a",
    ("SST-2", "train"): "3f640243d31b1ee4915b6cc6a8f35802a652349c0ca830fa46a3f3bba8f16ae1",
    ("SST-2", "test"): "ce6fa81d286acbe375737ee8d6451fc762d140efc1f2aaeada60392fd6e027b6",
    ("MNLI", "train"): "a2a2478555ce7ccbbd9e66428ed2755062723235fb7179848de4fc6824f77d31",
    ("MNLI", "test"): "7e27107d3d6b00d4656329eb3b2c6db8b2ac611a2e0b6361a1f6ba8308eb44b2",
    ("CB", "train"): "0e5934ea2d4ceb45a2302f010fd73ec03bcd2ef11e08b9f0343780e3cf14b3b6",
    ("CB", "test"): "08eb4ce70c035b8819c1e5a3be4de86ff8c3b86a82f167e4550038f921f7d5bc",
    ("RTE", "train"): "e2cf7839adeac766b8d0ef332c5e8b8871511e08be043604c17f31722600b85b",
    ("RTE", "test"): "36e6854748b83b0c934fb070cbb736b454d2087e6f8591818939bfc7912ef20b",
    ("QQP", "train"): "78fe69b4c1e4d0f5210846a58b8f64e0b9a95f289268750f5045467e01e88fb2",
    ("QQP", "test"): "befe09f8be7111eb5eb2af16c888609dddcf3fa20641e3fc36b6b649bba036b5",
    ("WiC", "train"): "fe609ff3e8f4434823ad5c33f53cbc4426d2a58694c6107e3ff4187c569fb5da",
    ("WiC", "test"): "79dea69747df2ed95e3a29f5236f37b04f579489ab8571b3cdbe7dee9b1c4fe8",
    ("COPA", "train"): "7f1fcd63ed8fb0deff3b0e182c498b824522cfb1867fc5f6879c87f432fc38dc",
    ("COPA", "test"): "44ad2d88561c7f66d75895187140bb47a3a6eab1c2679ea8847abbead52ba785",
    ("BoolQA", "train"): "ffcabaed2a7bbecacb62946e4d3d49cc8c73efaad024d2fc9306357cc875ab40",
    ("BoolQA", "test"): "acc9ebb68bfcfc60bed1949292ae1cd1fc5213ca7ec3867cce875637b0a3ad0e",
    ("MultiRC", "train"): "6ce76a57aed8d55c9189601621ddfdc5531c5697eb78157a239043c6a3c29536",
}
