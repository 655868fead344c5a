"use strict";
(function () {
  var root = document.documentElement;
  var theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", function () {
    var dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : window.matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  var search = document.getElementById("search");
  var kind = document.getElementById("kind");
  var finding = document.getElementById("finding");
  var count = document.getElementById("count");
  var cases = Array.prototype.slice.call(document.querySelectorAll(".case"));
  var texts = cases.map(function (one) { return one.textContent.toLowerCase(); });
  function filter() {
    var words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    var shown = 0;
    cases.forEach(function (one, at) {
      var tags = one.dataset.tags.split(" ");
      var fits = words.every(function (word) { return texts[at].indexOf(word) >= 0; });
      if (kind.value && finding.value) {
        // A kind of error and a finding mean that error of that finding.
        var pair = kind.value + ":" + finding.value;
        var ofCase = kind.value === "false_normal" || kind.value === "invented_normal" || kind.value === "contradiction";
        fits = fits && (ofCase ? tags.indexOf(kind.value) >= 0 && tags.indexOf(finding.value) >= 0 : tags.indexOf(pair) >= 0);
      } else {
        fits = fits && (!kind.value || tags.indexOf(kind.value) >= 0) && (!finding.value || tags.indexOf(finding.value) >= 0);
      }
      one.hidden = !fits;
      shown += fits ? 1 : 0;
    });
    count.textContent = shown + " / " + cases.length;
  }
  [search, kind, finding].forEach(function (control) { control.addEventListener("input", filter); });
  document.getElementById("tools").hidden = false;
  filter();

  var select = document.getElementById("confusion-select");
  select.hidden = false;
  select.addEventListener("input", function () {
    Array.prototype.forEach.call(document.querySelectorAll("table.confusion"), function (shown) {
      var table = JSON.parse(shown.parentNode.querySelector(".confusion-data").textContent)[select.value];
      Array.prototype.forEach.call(shown.querySelectorAll("td"), function (cell, at) {
        cell.textContent = table[Math.floor(at / 4)][at % 4];
      });
    });
  });
})();
